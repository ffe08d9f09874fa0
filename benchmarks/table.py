"""The tables of `benchmarks/README.md`, made from the result files: `python -m benchmarks.table [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import results

README = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- results: begin (python -m benchmarks.table) -->", "<!-- results: end -->"


def render(found: list[dict[str, Any]]) -> str:
    """All results as Markdown, by name; says so when there are none."""
    if not found:
        return "No result has been recorded yet."
    makers = {
        "train_throughput": _training,
        "score_throughput": _windows,
        "score_best_of_n": _scoring,
        "serve_load": _serving,
        "quality_vs_trl": _quality,
    }
    return "\n\n".join(makers[result["benchmark"]](result) for result in found)


def put(readme: str, table: str) -> str:
    """The README's text with everything between the two markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name} lacks the markers {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _training(result: dict[str, Any]) -> str:
    config, facts = result["config"], result["workload"]
    head = (
        f"### {result['name']}\n\n{Path(config['model']).name}, {facts['layers']} layers, {config['precision']}"
        f"{', gradient checkpointing' if config.get('gradient_checkpointing') else ''}; "
        f"{', '.join(Path(source).name for source in config['data'])}; {config['steps']} steps of "
        f"{config['pairs_per_step']} pairs, {config['passes']} passes; {_where(result)}\n\n"
    )
    gpu = any("mfu_minimal_percent" in arm for arm in result["arms"].values())
    titles = [
        "arm",
        "pairs/s",
        "pairs/CPU s",
        "x TRL wall",
        "x TRL CPU",
        "computed tok/s",
        "useful tok/s",
        "padding %",
        "tokens / tries",
    ]
    titles += ["peak GiB", "first loss"] + (["MFU minimal %", "MFU hardware %"] if gpu else [])
    rows = [titles, ["---", *["--:"] * (len(titles) - 1)]]
    for name, arm in result["arms"].items():
        speedup = result["comparisons"]["speedup"].get(name)
        loss = arm["loss_first_step"]
        row = [
            name,
            _spread(arm["pairs_per_second"]),
            _spread(arm["pairs_per_cpu_second"]),
            _spread(speedup["wall"], 2) if speedup else "1" if name == results.BASELINE else "",
            _spread(speedup["cpu"], 2) if speedup else "1" if name == results.BASELINE else "",
            f"{arm['tokens_computed_per_second']:.0f}",
            f"{arm['tokens_useful_per_second']:.0f}",
            f"{arm['padding_percent']:.1f}",
            f"{arm['computed_per_trie_token']:.2f}" if "computed_per_trie_token" in arm else "",
            f"{arm['peak_memory'] / 2**30:.2f}",
            f"{loss:.6f}" if loss is not None else "",
        ]
        if gpu:
            row += [f"{arm.get(key, 0):.1f}" for key in ("mfu_minimal_percent", "mfu_hardware_percent")]
        rows.append(row)
    return head + _table(rows) + _overhead(result) + _planned(facts) + _notes(result)


def _planned(facts: dict[str, Any]) -> str:
    """What was foreseen of a GPU's memory; of a CPU nothing is."""
    planned = facts.get("planned_memory")
    return f"\n\n`btrm plan` foresees {planned['total'] / 2**30:.2f} GiB for btrm-shared." if planned else ""


def _windows(result: dict[str, Any]) -> str:
    config, counts = result["config"], result["workload"]["measured"]
    head = (
        f"### {result['name']}\n\n{Path(config['model']).name}, {result['workload']['layers']} layers, "
        f"{config['precision']}; {', '.join(Path(source).name for source in config['data'])}; {counts['pairs']} pairs "
        f"of {counts['prompts']} prompts, both sides scored, {config['passes']} passes; {_where(result)}\n\n"
    )
    rows = [["arm", "conversations/s", "CPU s", "btrm is faster, wall", "CPU", "tokens / tries"]]
    rows.append(["---", *["--:"] * (len(rows[0]) - 1)])
    for name, arm in result["arms"].items():
        ratio = result["comparisons"].get(name)
        times = [_spread(ratio[key], 2) if ratio else "" for key in ("wall", "cpu")]
        row = [name, _spread(arm["conversations_per_second"], 1), _spread(arm["cpu_seconds"], 2), *times]
        rows.append([*row, f"{arm['computed_per_trie_token']:.2f}"])
    return (
        head
        + _table(rows)
        + f"\n\nLargest difference of a reward: {result['largest_difference']:.1e}."
        + _notes(result)
    )


def _scoring(result: dict[str, Any]) -> str:
    config = result["config"]
    head = (
        f"### {result['name']}\n\n{Path(config['model']).name}, {result['layers']} layers, {config['precision']}; one "
        f"prompt of {result['prompt_tokens']} tokens, {result['responses']} responses of {result['response_tokens']}; "
        f"{_where(result)}\n\n"
    )
    rows = [["arm", "seconds", "CPU s", "tokens", "speed-up of shared"], ["---", "--:", "--:", "--:", "--:"]]
    for name, arm in result["arms"].items():
        speedup = result["comparisons"].get(name)
        rows.append(
            [
                name,
                _spread(arm["seconds"]),
                _spread(arm["cpu_seconds"]),
                str(arm["tokens_computed"]),
                _spread(speedup["wall"], 2) if speedup else "",
            ]
        )
    return (
        head
        + _table(rows)
        + f"\n\nLargest difference of a reward: {result['largest_difference']:.1e}."
        + _notes(result)
    )


def _serving(result: dict[str, Any]) -> str:
    config, work, over = result["config"], result["workload"], result["comparisons"]["served_over"]
    served = result["arms"]["served"]
    head = (
        f"### {result['name']}\n\n{config['model']}, {work['layers']} layers, {config['dtype']}; {config['prompts']} "
        f"prompts, {config['responses']} responses to each, one a request, from {config['clients']} clients; "
        f"{config['rounds']} rounds; {_where(result)}\n\n"
    )
    rows = [["arm", "rows/s", "CPU s", "served is faster"], ["---", "--:", "--:", "--:"]]
    for name, arm in result["arms"].items():
        faster = _spread(over[name], 2) if name in over else ""
        rows.append([name, _spread(arm["rows_per_second"], 1), _spread(arm["cpu_seconds"], 2), faster])
    times = {key: _spread(served[f"{key}_seconds"], 2) for key in ("p50", "p99")}
    text = f"\n\nAn answer took {times['p50']} s (p50), {times['p99']} s (p99). Largest difference of a reward: "
    return head + _table(rows) + text + f"{served['largest_difference']['max']:.1e}." + _notes(result)


def _quality(result: dict[str, Any]) -> str:
    config, facts, found = result["config"], result["workload"], result["comparisons"]
    frozen = f", the last {config['train_last_layers']} trained" if config["train_last_layers"] else ""
    head = (
        f"### {result['name']}\n\n{config['model']}, first {facts['layers']} layers{frozen}, {config['precision']}; "
        f"{', '.join(config['train'])}: {facts['train_pairs']} pairs, {facts['steps']} steps of "
        f"{config['pairs_per_step']}, learning rate {config['learning_rate']:g}, {len(config['seeds'])} seeds; "
        f"judged on {facts['evaluation_pairs']} pairs of {facts['evaluation_prompts']} other prompts; "
        f"{_where(result)}\n\n"
    )
    titles = ["arm", "accuracy (95 %)", "per seed", "loss", "training s", "process s", "CPU s"]
    rows = [titles, ["---", *["--:"] * (len(titles) - 1)]]
    for name, arm in result["arms"].items():
        low, high = arm["bootstrap"]
        row = [name, f"{arm['accuracy']:.3f} ({low:.3f} to {high:.3f})"]
        row += [", ".join(f"{run['accuracy']:.3f}" for run in arm["runs"]), f"{arm['loss']:.4f}"]
        rows.append(row + [_spread(arm[key], 1) for key in ("training", "wall", "cpu")])
    both, wins = found["pooled"], result["arms"]["btrm"]["longer_wins"]
    interval = both["interval"]
    text = (
        f"\n\nbtrm minus TRL: {both['difference']:+.3f} ({interval['low']:+.3f} to {interval['high']:+.3f}, pairs "
        f"resampled by prompt), {'a difference' if both['shown'] else 'no difference shown'}; per seed "
        + ", ".join(f"{one['difference']:+.3f} (p {one['p_value']:.2f})" for one in found["seeds"])
        + f"; the longer answer wins {wins:.3f}. btrm trains {_spread(found['speedup']['training'], 2)} times as fast "
        f"({_spread(found['speedup']['cpu'], 2)} in CPU seconds of the whole process)."
    )
    return head + _table(rows) + text + _notes(result)


def _overhead(result: dict[str, Any]) -> str:
    lines = []
    for name, figures in result["comparisons"]["overhead"].items():
        parts = [f"{_spread(figures['wall'], 1)} % wall, {_spread(figures['cpu'], 1)} % CPU"]
        if "wall_without_optimizer" in figures:
            parts.append(f"{_spread(figures['wall_without_optimizer'], 1)} % wall without the optimiser's update")
        lines.append(f"btrm-shared over `{name}` on the same rows: {'; '.join(parts)}.")
    return "".join(f"\n\n{line}" for line in lines)


def _where(result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    place = hardware.get("gpu") or f"{hardware['cpu']}, {result['config']['threads']} threads"
    commit = (result["commit"] or "no commit")[:10] + (" **with uncommitted changes**" if result["dirty"] else "")
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl") if name in versions)
    return f"{place}; {named}; commit {commit}; {result['created'][:10]}."


def _notes(result: dict[str, Any]) -> str:
    return "".join(f"\n\n{note}" for note in result["notes"])


def _spread(figures: dict[str, float], digits: int = 3) -> str:
    middle, low, high = (f"{figures[key]:.{digits}f}" for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str]) -> int:
    """Rewrite the README's tables, or with --check say (exit code 1) that they are out of date."""
    old = README.read_text(encoding="utf-8")
    new = put(old, render(results.load_all()))
    if "--check" in arguments:
        if new != old:
            print("benchmarks/README.md is out of date: run python -m benchmarks.table", file=sys.stderr)
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
