r"""Appendix: somebody joins a run of chapter 6, leaves it, or says something, between two passes.

    say(run, "Teacher", "You have forgotten the pears.")     read by all from the next pass on
    add(run, "Carol")                                        writes from the next pass on
    dismiss(run, "Bob")

Views are made anew for each pass from the workers that there are, so that is all there is to it. The
record of the next pass has these events, and a restored run goes through them again.
"""
from appendix.protocol import check_name, header


def say(run, name, text):
    """Somebody from outside speaks: the next pass reads these words, as a finished step of the history.

    Raises ValueError if a worker has that name, or if there is no room for so many words.
    """
    check_name(name, [w.name for w in run.workers])
    before, run.said = run.said, run.said + run.encode(f"\n\n**{name}:** {text.strip()}")
    if run.ending in ("context", "room"):
        run.said = before
        raise ValueError(f"what {name!r} says does not fit into the memory that is left")
    run.events.append(["say", name, text])


def add(run, name):
    """A new worker, who writes from the next pass on. Raises ValueError if one has that name."""
    check_name(name, [w.name for w in run.workers])
    opening = run.encode("\n\n" + header(name, 1)) if run.layout.headers else run.openings()[1][0]
    run.enlist(name, opening)
    run.encode_separators()
    run.events.append(["add", name])


def dismiss(run, name):
    """A worker leaves. Where finished steps move, its unfinished one stays, as the history's last.

    Raises ValueError if there is no such worker, or no other one.
    """
    leaving = next((w for w in run.workers if w.name == name), None)
    if leaving is None or len(run.workers) == 1:
        raise ValueError(f"{name!r} cannot leave: there has to be a worker of that name, and another")
    if run.layout.moves:
        run.to_history(leaving)
    run.workers.remove(leaving)
    run.events.append(["dismiss", name])
