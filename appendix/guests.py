r"""Appendix: somebody joins a run of chapter 6, leaves it, or says something, between two passes.

    run.say("Teacher", "You have forgotten the pears.")     read by all from the next pass on
    run.add_worker("Carol")                                 writes from the next pass on
    run.dismiss("Bob")

These functions are methods of a run, chapter 6's Hogwild, which is their first argument.
Views are made anew for each pass from the workers that there are, so that is all there is to it. The
record of the next pass has these events, and a restored run goes through them again. What is refused has
not happened at all.
"""
from contextlib import contextmanager

from appendix import command
from appendix.protocol import check_name


def say(run, name, text):
    """Somebody from outside speaks: the next pass reads these words, as a finished step of the history.

    Raises ValueError if a worker has that name, if these are no words, or if there is no room for so
    many.
    """
    check_name(name, [w.name for w in run.workers])
    text = command.text(text, "text")
    with event(run, "say", name, text):
        run.said = run.said + run.encode(f"\n\n**{name}:** {text.strip()}")


def add(run, name):
    """A new worker, who writes from the next pass on.

    Raises ValueError if one has that name, or if there is no room for another one.
    """
    check_name(name, [w.name for w in run.workers])
    with event(run, "add", name):
        run.enlist(name, run.encode(run.first_words(name)) if run.layout.headers
                   else run.openings()[1][0])
        run.encode_separators()


def dismiss(run, name):
    """A worker leaves. Where finished steps move, its unfinished one stays, as the history's last,
    without the token that has been picked, but not been fed yet.

    Raises ValueError if there is no such worker, or no other one who has not finished.
    """
    leaving = next((w for w in run.workers if w.name == name), None)
    if leaving is None or all(w is leaving or w.finished for w in run.workers):
        raise ValueError(f"{name!r} cannot leave: there has to be a worker of that name, and another "
                         "who goes on")
    with event(run, "dismiss", name):
        if run.layout.moves:
            run.to_history(leaving)
        run.workers.remove(leaving)


@contextmanager
def event(run, *told):
    """What is done to a run in this context is noted for its next record. If it fails, or if the run
    could not go on after it, it is undone."""
    said, workers, ids, separators = run.said, [*run.workers], {**run.ids}, {**run.separators}
    try:
        with run.cache.rewound(only_on_error=True):
            yield
            if run.ending in ("context", "room"):
                raise ValueError(f"{' '.join(told[:2])}: that does not fit into the memory that is left")
    except Exception:
        known = {*ids, *separators.values()}
        run.cache.discard({*run.ids, *run.separators.values()} - known)
        run.said, run.workers, run.ids, run.separators = said, workers, ids, separators
        raise
    run.events.append([*told])
