"""Typical wrong solutions of the exercises: signs, off by one, another order, something left out. The
tests that check an exercise (appendix/exercises.py) have to notice each of them; and so they have to
notice a body that is missing.

They are part of tests/mutations.py, which runs them.
"""
from appendix import exercises

WRONG = {  # chapter -> {function: [(old text, new text)]}
    "1": {
        "inverse_frequencies": [
            ("1.0 / parameters", "2.0 / parameters"),
            ("torch.arange(0, size, 2).float() / size", "torch.arange(0, size, 2).float() / head_dim"),
            ('if kind == "dynamic":', "if False:")],
        "cos_sin": [
            ("dtype=torch.float64)[..., None] * rope.inv_freq",
             "dtype=torch.float32)[..., None] * rope.inv_freq.float()"),
            ("return angles.cos().float(), angles.sin().float()",
             "return angles.sin().float(), angles.cos().float()"),
            ("return angles.cos().float(), angles.sin().float()", "return angles.cos(), angles.sin()"),
            ("torch.as_tensor(positions, dtype=torch.float64)[..., None] *", "positions *")],
        "rotate": [
            ("[x1 * cos - x2 * sin, x2 * cos + x1 * sin]", "[x1 * cos + x2 * sin, x2 * cos - x1 * sin]"),
            ("x1, x2, kept = x.split([half, half, rest], -1)",
             "x1, x2, kept = x[..., :2 * half:2], x[..., 1:2 * half:2], x[..., 2 * half:]"),
            ("rotated = [kept, *rotated] if rotates_last else", "rotated ="),
            ("kept = kept.expand(*rotated[0].shape[:-1], rest)", "kept = kept * cos[..., :1]"),
            ("    if rest:\n", "    if False:\n")],
        "shift": [
            ("cos, sin, rope.rotates_last).to(", "cos, -sin, rope.rotates_last).to("),
            ("return rotate(keys.float()", "return rope.attention_scaling * rotate(keys.float()"),
            ("return rotate(keys.float(), cos, sin, rope.rotates_last)",
             "return rotate(keys.float(), cos, sin)")]},
    "2": {
        "SharedCache.discard": [
            ("for b in blocks] + self.free, []", "for b in blocks], []"),
            ("sorted(filter(len, gone), key=lambda span: span.start)", "gone"),
            ("if self.free and self.free[-1].stop == span.start:", "if False:"),
            ("ids for block, ids in self.prompts.items() if block not in blocks}",
             "ids for block, ids in self.prompts.items()}")],
        "SharedCache.reserve": [
            ("            self.check_room(block, count)\n        self.grow()",
             "            pass\n        self.grow()"),
            ("first = block.start + block.length", "first = block.start"),
            ("            block.length += count", "            block.length = count"),
            ("self.new_slots = torch.cat(spans)", "self.new_slots = torch.cat(spans[::-1])")],
        "SharedCache.copy": [
            ("rope.shift(keys[:, here], target.length, self.ropes[layer])", "keys[:, here]"),
            ("rope.shift(keys[:, here], target.length, self.ropes[layer])",
             "rope.shift(keys[:, here], target.length + length, self.ropes[layer])"),
            ("target.length, self.ropes[layer])", "target.length, self.ropes[0])"),
            ("self.values[layer][:, here]  # values", "self.values[layer][:, there]  # values"),
            ("self.check_room(target, length)", "self.check_room(target, 0)")],
        "SharedCache.rewound": [
            ("block.length = lengths.get(block, 0)", "block.length += 0"),
            ("if failed or not only_on_error:", "if failed or only_on_error:")],
        "SharedCache.write": [
            ("memory[layer] = new.new_empty(new.shape[0], self.slots, new.shape[2])",
             "memory[layer] = new.new_empty(new.shape[0], self.slots, new.shape[2]).double()"),
            ("self.values[layer].index_copy_(1, slots, values)",
             "self.values[layer].index_copy_(1, slots.sort()[0], values)")]},
    "3": {
        "combined": [
            ('*([words["others"], *closed] if closed else [])', "*closed"),
            ('(step, words["dots"])', '(words["dots"], step)'),
            ('words["own"], own]', "own]")],
        "Layout.final_view": [
            ("return (combined if known else contiguous)(", "return contiguous("),
            ("return (combined if known else contiguous)(", "return self.view("),
            ("(combined if known else contiguous)(", "(combined if self.words else contiguous)(")],
        "occurrences": [
            ("        before[block] += 1", "        before[block] = 1"),
            ("yield block, before[block]\n        before[block] += 1",
             "before[block] += 1\n        yield block, before[block]")],
        "fill_tables": [
            ("visible[row, new] = position[new] + 1", "visible[row, new] = position[new]"),
            ("visible[row, new] = position[new] + 1", "visible[row, new] = own.length"),
            ("offset[row, new] = -place", "offset[row, new] = place"),
            ("row = rows[block, before]", "row = rows[block, 0]"),
            ("np.arange(own.length - count, own.length)", "np.arange(own.length, own.length + count)"),
            ("        n += count", "        n += 1"),
            ("place += block.length", "place += block.capacity"),
            ("{} if rows is None else rows", "rows or {}"),
            ("(position, offset, visible)), writers)", "(position, offset, visible)))")]},
    "4": {
        "attention_spec": [
            ("-offset, rotation)", "offset, rotation)"),
            (">= window).to(q.device)", "> window).to(q.device)"),
            ("scores = scale * query @", "scores = query @"),
            ("return torch.stack(outputs, 1).to(q.dtype)", "return torch.stack(outputs, 1).float()")],
        "attention": [
            ("rope.rotate(q.float() * scale, cos, sin,", "rope.rotate(q.float() * scale, cos, -sin,"),
            ("if hidden is not None:", "if False:"),
            ("rotated.reshape(len(cos), heads, -1, size)",
             "rotated.reshape(len(cos), -1, heads, size).transpose(1, 2)"),
            ("weights = scores.softmax(-1).split([sum(sizes) for _, sizes in parts], -1)",
             "weights = [w.softmax(-1) for w in scores.split([sum(sizes) for _, sizes in parts], -1)]"),
            ("    cos, sin, parts, hidden = prepare(tables, rotation, window, q.device)\n",
             "    return attention_spec(q, k, v, tables, rotation, scale, window)\n"),
            ("    cos, sin, parts, hidden = prepare(tables, rotation, window, q.device)\n",
             "    k = rope.shift(k, 0, rotation)\n"
             "    cos, sin, parts, hidden = prepare(tables, rotation, window, q.device)\n"),
            ("scores.softmax(-1).split([", "scores.detach().softmax(-1).split([")],
        "first_slots": [
            ("- window + 1)", "- window)"),
            ("tables.position + tables.offset", "tables.offset")],
        "visible_rows": [
            ("hidden = (j >= tables.visible[b][:, None])", "hidden = (j > tables.visible[b][:, None])"),
            (" | (j < first[b][:, None])  # [N, slots]", "  # [N, slots]"),
            ("low, high = int(first[b][sees].min()), ", "low, high = 0, ")],
        "run_by_run": [
            ("in zip(queries, tables)]", "in zip(queries, tables[::-1])]"),
            ("return torch.cat(outputs, 1)", "return torch.cat(outputs[::-1], 1)"),
            ("outputs = [function(query, k", "outputs = [attention(query, k")]},
    "5": {
        "kernel": [
            ("end_seen = load(visible + column, real)", "end_seen = load(visible + column, real) - 1"),
            ("if row != rotated_for:", "if rotated_for < 0:"),
            ("fade = tl.exp2(peak - higher)[:, None]", "fade = tl.exp2(peak - peak)[:, None]"),
            ("total = total * fade + weight", "total = total + weight"),
            ("q2 = (y * cosine + x * sine)", "q2 = (y * cosine - x * sine)"),
            ("q1 = (x * cosine - y * sine).to(OPERAND)", "q1 = x * cosine - y * sine"),
            ("(token + n) * q_token", "n * q_token"),
            ("cell, low, high = tl.load(chunks + 3), tl.load(chunks + 4),", "cell, low, high = 0, 0,")],
        "merge": [
            ("fade = tl.exp2(peak - tl.max(peak, 0))", "fade = tl.exp2(peak - peak)"),
            ("/ tl.sum(fade * total, 0)", "/ tl.sum(total, 0)"),
            ("head * GROUP + m // new) * DV", "head * GROUP + m % GROUP) * DV"),
            ("out += ((token + m % new)", "out += ((m % new)")],
        "prepare": [
            ("cell - row * new, low, ends[-1]))", "cell - row * new, 0, ends[-1]))"),
            ("tiles = (length + tile - 1) // tile - first_tile", "tiles = length // tile - first_tile"),
            ("ends = low + tiles.cumsum(0)", "ends = tiles.cumsum(0)")],
        "Decoder.launch": [("static.copy_(numbers)", "pass"), ("        launch()\n", ""),
                           ("if self.captured[shapes] is None:", "if True:")]},
    "6": {
        "feed": [
            ("if logits.isnan().any():", "if False:"),
            ("with cache.rewound(only_on_error=True):\n        cache.reserve(",
             "if True:\n        cache.reserve("),
            ("with cache.rewound(only_on_error=True):\n        cache.reserve(",
             "with cache.rewound():\n        cache.reserve(")],
        "Hogwild.is_over": [
            ("self.settings.max_step and line_end", "self.settings.max_step"),
            ("self.layout.moves and (long or full))", "(long or full))")],
        "Hogwild.close_step": [
            ("w.checks_due - 1), w.step + 1", "w.checks_due - 1), w.step"),
            ('CHECK if w.checks_due else ""', "CHECK"),
            ('"\\n\\n"[len(last) - len(last.rstrip("\\n")):] + ', ""),
            ("w.ids = w.pending = [w.ids[-1], *inserted]", "w.ids = w.pending = inserted"),
            ('"step": w.step, "text": self', '"step": w.step + 1, "text": self'),
            ('"text": self.decode(w.ids[:-1])}', '"text": self.decode(w.ids)}'),
            ('"opened": w.text if self.layout.moves else self.decode(inserted)}', '"opened": ""}')],
        "Hogwild.schedule_checks": [
            ('random.Random(f"{self.settings.seed} check {number}").choice(asked)', "asked[0]"),
            ("checks_due += 1", "checks_due = 1"),
            ("self.generated += len(writing)", "self.generated += 1")],
        "Hogwild.concluding": [
            ("block.length = length\n", "pass\n"),
            ("coming[k] = coming[k][0], said[k][-1:]", "coming[k] = coming[k][0], said[k]"),
            ("        finally:\n            for block", "        except ZeroDivisionError:\n"
             "            pass\n        else:\n            for block")]},
    "7": {
        "evaluate": [
            ("if passes in budgets:", "if passes in budgets[:1]:"),
            ("for budget in budgets if budget > passes]", "for budget in budgets if budget < passes]"),
            ("in_time, answer = run.written_answer() is not None, ", "in_time, answer = True, "),
            ('tokens + len(record["sampled"])', "tokens + 1"),
            ("answers[str(passes)] = yield from asked(run)\n",
             "answers[str(passes)], passes = (yield from asked(run)), passes + 1\n"),
            ("                    answers[str(passes)] = yield from asked(run)\n",
             "                    answers[str(passes)] = yield from asked(run)\n"
             "                    seconds += perf_counter() - begin\n"),
            ("except generate.TooLong:", "except ZeroDivisionError:"),
            ("score, understood = tasks.mark(answer, problem)", "score, understood = 1.0, True"),
            ('step_ends += [(passes, closed["worker"])', 'step_ends = [(passes, closed["worker"])'),
            ('step_ends += [(passes, closed["worker"]) for closed in record["closed"]]', "pass")],
        "method": [
            ("range(1, most + 1)", "range(1, most)"),
            ("workers = int(count) if colon else usual", "workers = usual"),
            ("if name not in METHODS:", "if False:")],
        "runs_of": [
            ("workers=protocol.NAMES[:workers], **", "workers=protocol.NAMES[:1], **"),
            ("return kind(start, asked, workers)", "return kind(start, asked, None)"),
            ("len(problem[\"answers\"]), settings", "1, settings")]},
    "recording": {
        "Ledger.recording": [
            ("step.start, end = end, end + step.length", "step.start, end = 0, end + step.length"),
            ("n = column.offset, column.visible, new.stop", "n = column.offset, column.visible, 0"),
            ("n = column.offset, column.visible", "n = -column.offset, column.visible"),
            ("torch.tensor(self.weight), own", "torch.zeros(len(ids)), own"),
            ("torch.tensor(self.weight), own", "torch.ones(len(ids)), own"),
            ("len(self.ids) if self.prefill is None else self.prefill", "0"),
            ("len(self.ids) if self.prefill is None else self.prefill", "self.prefill or 0")],
        "Ledger.fill": [
            ("rope.shift(keys[:, here], first, self.ropes[layer])", "keys[:, here]"),
            ("rope.shift(keys[:, here], first, self.ropes[layer])",
             "rope.shift(keys[:, here], -first, self.ropes[layer])"),
            ("first += step.length", "first = step.length")],
        "pieces_of": [
            ("layouts.Tables(base + tables.start[seen]", "layouts.Tables(tables.start[seen]"),
            ("tables.visible[:, first:end].any(1)", "tables.visible[:, first:end].all(1)"),
            ("tables.visible[:, first:end].any(1)", "slice(None)"),
            ("*range(0, recording.prefill, size), *range(recording.prefill, total, size)",
             "*range(0, total, size)"),
            ("*range(0, recording.prefill, size), *range(recording.prefill, total, size)",
             "0, recording.prefill")],
        "loss": [
            ("@ weight / weight.sum()", "@ weight"),
            ("@ weight / weight.sum()", ".mean()"), ("if not weight.sum():", "if False:")]},
}


def mutations():
    """All of them as tests/mutations.py has them, and for each marked function one without its body."""
    found = []
    for chapter, (file, todo) in exercises.FILES.items():
        source = (exercises.ROOT / file).read_text()
        for name, exercise in todo.items():
            node, _ = exercises.functions(source)[name]
            first = exercises.body(node)[0]
            lines = source.splitlines(keepends=True)[first.lineno - 1:node.end_lineno]
            wrong = [("".join(lines), f"{' ' * first.col_offset}raise NotImplementedError\n"),
                     *WRONG[chapter][name]]
            found += [(f"exercise {chapter}: {name} {i}", file, old, new,
                       exercises.chosen(exercise))
                      for i, (old, new) in enumerate(wrong)]
    return found
