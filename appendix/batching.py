r"""Appendix: many runs in one forward pass.

A run feeds a few tokens per pass, and all weights are read for them. Others could use the same reading.
A *job* is a generator: it yields what it wants to be fed (a group, see chapter 6's `feed`), is sent the
logits, goes on, and returns its result. So whatever a run does, writing or being asked for its answer,
can be done beside what others do; and as soon as one job ends, the next one begins (continuous
batching). No run notices: strangers share weights, not scores (chapter 4's `hook`).
"""
from itertools import islice

MOST = 16  # beyond that, little is gained on a CPU


def as_memory_allows(cache, free):
    """A function: how many jobs there may be, if so many are live? One at first, which shows what one
    takes; then as many as there were, and as half of the free memory holds besides; MOST at most.

    cache: which all jobs share; free: () -> bytes.
    """
    peak = 0  # so many have memory, also after they have ended

    def at_once(live):
        """Answer that, for this moment."""
        nonlocal peak
        peak = max(peak, live)
        taken = sum(memory.nbytes for layers in (cache.keys, cache.values) for memory in layers.values())
        more = int(free() / 2 * peak / taken) if taken else 0
        return max(1, live, min(MOST, peak + more))
    return at_once


def alone(job, feed):
    """Do one job: returns its result."""
    return next(side_by_side([job], feed))


def side_by_side(jobs, feed, at_once=1):
    """Do jobs, at most `at_once` at a time; yields their results as they end.

    Args:
        feed: a list of groups -> for each one its logits. Where it fails, groups are fed one by one, and
            the error is raised in the job that it belongs to.
        at_once: a number, or a function like that of `as_memory_allows`.
    """
    coming, live = iter(jobs), {}  # live: {job: the group that it wants to be fed}
    while True:
        most = at_once(len(live)) if callable(at_once) else at_once
        new = [(job, job.send, None) for job in islice(coming, max(0, most - len(live)))]
        if not new and not live:
            return
        for job, go_on, what in new or fed(live, feed):
            try:
                live[job] = go_on(what)
            except StopIteration as end:
                live.pop(job, None)
                yield end.value


def fed(live, feed):
    """Feed what the jobs want. Yields (job, how it goes on, with what)."""
    jobs, groups = [*live], [*live.values()]
    try:
        logits = feed(groups)
    except Exception as error:  # of any kind: NaN in one run, or too little memory for all
        if len(jobs) == 1:
            yield jobs[0], jobs[0].throw, error
        else:
            for job, group in zip(jobs, groups):
                yield from fed({job: group}, feed)
    else:
        for job, some in zip(jobs, logits):
            yield job, job.send, some
