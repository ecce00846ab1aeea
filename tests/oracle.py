"""The oracle: the obvious engine. It shares no code with the chapters.

Every worker is a row of a batch. At each layer, each worker's view is put together anew: the blocks'
keys are rotated to their absolute places in that view, concatenated, and padded to the longest view.
The *stock* attention of transformers runs on that, with a 4D mask. (Workers see each other's tokens of
the very same pass, so they cannot run one by one.) This is also how the engines that one finds in the
wild work, so it doubles as the baseline for speed.
"""
import torch
from transformers import Cache


def turn(x, cos, sin):
    """Half-split rotation of the first dimensions of x [..., S, D] by angles [S, R/2]."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class NaiveCache(Cache):
    """Blocks as plain growing tensors of unrotated keys; hands out complete views."""

    def __init__(self, model, number):
        super().__init__(layers=[])
        self.inv_freq = model.model.rotary_emb.inv_freq.double()
        self.keys = [{} for _ in range(number)]  # block -> layer -> [Hk, n, D], unrotated
        self.values = [{} for _ in range(number)]
        self.length = [0] * number
        self.writers, self.positions = [], []

    def begin(self, writers):
        """Announce a pass: `writers` are pairs (order of blocks, own block last; number of new
        tokens)."""
        for order, count in writers:
            self.length[order[-1]] += count
        self.writers = writers
        self.positions = []
        for order, count in writers:
            end = sum(self.length[b] for b in order)
            self.positions.append(torch.arange(end - count, end))
        longest = max(int(p[-1]) for p in self.positions) + 1
        angles = torch.arange(longest).double()[:, None] * self.inv_freq
        self.cos, self.sin = angles.cos().float(), angles.sin().float()

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Store the new keys unrotated, then build every worker's view from scratch."""
        for row, (order, count) in enumerate(self.writers):
            at = self.positions[row]
            unrotated = turn(key_states[row, :, :count].float(), self.cos[at], -self.sin[at])
            for memory, new in ((self.keys, unrotated), (self.values, value_states[row, :, :count])):
                old = memory[order[-1]].get(layer_idx)
                memory[order[-1]][layer_idx] = new if old is None else torch.cat((old, new), 1)
        views_k, views_v = [], []
        longest = max(int(p[-1]) for p in self.positions) + 1
        for order, _ in self.writers:
            filled = [b for b in order if self.length[b]]
            k = torch.cat([self.keys[b][layer_idx] for b in filled], 1)  # [Hk, view, D]
            v = torch.cat([self.values[b][layer_idx] for b in filled], 1)
            k = turn(k, self.cos[:k.shape[1]], self.sin[:k.shape[1]]).to(key_states.dtype)
            pad = (0, 0, 0, longest - k.shape[1])
            views_k.append(torch.nn.functional.pad(k, pad))
            views_v.append(torch.nn.functional.pad(v, pad))
        return torch.stack(views_k), torch.stack(views_v)

    def get_seq_length(self, layer_idx=0):
        return 0

    def move(self, source, target):
        """Put block `source` behind block `target`."""
        for memory in (self.keys, self.values):
            for layer, new in memory[source].items():
                memory[target][layer] = torch.cat((memory[target][layer], new), 1)
            memory[source] = {}
        self.length[target] += self.length[source]
        self.length[source] = 0


@torch.no_grad()
def naive_pass(model, cache, writers):
    """One pass of the obvious engine. `writers`: pairs (order of blocks, token ids). Logits of each
    row's last token."""
    cache.begin([(order, len(ids)) for order, ids in writers])
    width = max(len(ids) for _, ids in writers)
    longest = max(int(p[-1]) for p in cache.positions) + 1
    ids = torch.zeros(len(writers), width, dtype=torch.long)
    positions = torch.zeros(len(writers), width, dtype=torch.long)
    for row, (_, tokens) in enumerate(writers):
        ids[row, :len(tokens)] = torch.tensor(tokens)
        positions[row, :len(tokens)] = cache.positions[row]
    # [rows, 1, new, longest]: in a view, the past is seen
    mask = torch.arange(longest) > positions[:, None, :, None]
    mask = torch.zeros(mask.shape).masked_fill(mask, float("-inf")).to(model.dtype)
    hidden = model.model(ids, position_ids=positions, past_key_values=cache,
                         attention_mask=mask).last_hidden_state
    last = torch.tensor([len(tokens) - 1 for _, tokens in writers])
    return model.lm_head(hidden[torch.arange(len(writers)), last])


def orders(layout, workers):
    """Order of blocks per worker, spelled out. Blocks: 0 history, 1 ... W workers, then (others),
    (own), <...>."""
    team = [*range(1, workers + 1)]
    return [order_of(me, team, layout, range(workers + 1, workers + 4)) for me in team]


def order_of(me, team, layout, words):
    """Order of blocks for one of a team; words: the blocks (others), (own), <...>."""
    rest = [w for w in team if w != me]
    if layout == "combined":
        others, own, dots = words
        seen = [0, others] if rest else [0]
        for w in rest:
            seen += [w, dots]
        return [*seen, own, me]
    return [0, *rest, me] if layout == "contiguous" else [0, me]


WORDS = ["\n\n### Work in progress (others)", "\n\n### Work in progress (own)", " <...>"]


def follow(model, tokenizer, layout, names, history, records):
    """Feed what a run has fed; yields the logits [writers, vocabulary] of every pass.

    Args:
        names: of the workers, in order; history: token ids of the prompt.
        records: the run's passes: "fed" per worker, "closed" steps, and "events": who came, left or said
            something before.
    """
    blocks = 1 + len(names) + sum(event[0] == "add" for record in records for event in record["events"])
    words, new = range(blocks, blocks + 3), iter(range(1, blocks))
    cache, team, moves = NaiveCache(model, blocks + 3), {}, layout in ("combined", "interleaved")
    naive_pass(model, cache, [([0], history)])

    def encode(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    def separate():
        """Encode those words of the combined layout that the team lacks, in the order of a view."""
        others, own, dots = words
        lacking = [b for b in ([others, dots, own] if len(team) > 1 else [own]) if not cache.length[b]]
        if layout == "combined" and lacking:
            naive_pass(model, cache, [([0, *lacking[:k + 1]], encode(WORDS[words.index(block)]))
                                      for k, block in enumerate(lacking)])

    team |= {name: next(new) for name in names}
    separate()
    for record in records:
        said = []
        for what, name, *text in record["events"]:
            if what == "say":
                said += encode(f"\n\n**{name}:** {text[0].strip()}")
            elif what == "add":
                team[name] = next(new)
                separate()
            else:
                gone = team.pop(name)
                if moves:
                    cache.move(gone, 0)
        writers = [(order_of(team[name], team.values(), layout, words), ids)
                   for name, ids in record["fed"].items()]
        yield naive_pass(model, cache, writers + [([0], said)] * bool(said))[:len(writers)]
        for closed in record["closed"] if moves else ():
            cache.move(team[closed["worker"]], 0)
