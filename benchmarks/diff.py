"""What one script changes against another, section by section.

    python benchmarks/diff.py ppo_continuous.py ppo_klpen.py
    python benchmarks/diff.py --table                  # the README's table of all scripts
    python benchmarks/diff.py --html docs/diff.html    # a page that shows any two scripts side by side

A section is what stands under a banner, so lines are counted as a reader meets them: removed plus added.
"""

import ast
import difflib
import itertools
import json
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
BASE = "ppo_continuous.py"
OTHERS = ("ppo_klpen.py", "ppo_multidiscrete_joint_loss.py", "hppo_hybrid.py", "vmpo.py")
ON_PAGE = (BASE, *OTHERS, "vmpo_lstm.py")
PAGE = Path(__file__).with_name("diff_page.html")  # the page without its data
BANNER = r"^# ===== (\w+) =+\n"


@dataclass
class Args:
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="A.py B.py")] = ()
    """two scripts"""
    table: tyro.conf.FlagCreatePairsOff[bool] = False
    """the table of section x script, in markdown"""
    html: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """where to write the page"""


def sections(path: Path) -> dict[str, list[str]]:
    """{name: lines}, in the file's order; what stands above the first banner is the Header."""
    head, *parts = re.split(BANNER, path.read_text(), flags=re.MULTILINE)
    return {name: text.splitlines() for name, text in [("Header", head), *zip(parts[::2], parts[1::2])]}


def edits(a: list[str], b: list[str]) -> list[tuple[int, int, int, int]]:
    """[(i1, i2, j1, j2)]: b has its lines j1 to j2 where a has i1 to i2; all others are equal."""
    opcodes = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [lines for tag, *lines in opcodes if tag != "equal"]


def changed(a: list[str], b: list[str]) -> int:
    """Lines removed plus lines added."""
    return sum((i2 - i1) + (j2 - j1) for i1, i2, j1, j2 in edits(a, b))


def show(a: Path, b: Path, colour: bool):
    paint = {"-": "\033[31m", "+": "\033[32m", "@": "\033[36m", "#": "\033[1m"} if colour else {}
    old, new = sections(a), sections(b)
    total = 0
    above = {name: sum(len(lines) + 1 for lines in list(old.values())[:k]) for k, name in enumerate(old)}
    for name in dict.fromkeys([*old, *new]):
        lines = old.get(name, []), new.get(name, [])
        count = changed(*lines)
        total += count
        out = [f"# {name}: {f'{count} lines differ' if count else 'same'}"]
        matcher = difflib.SequenceMatcher(None, *lines, autojunk=False)
        for group in matcher.get_grouped_opcodes(n=3) if count else []:
            out.append(f"@ {a.name}, line {above.get(name, 0) + group[0][1] + 1}")
            for tag, i1, i2, j1, j2 in group:
                if tag == "equal":
                    out += [f"  {line}" for line in lines[0][i1:i2]]
                else:
                    out += [f"- {line}" for line in lines[0][i1:i2]] + [f"+ {line}" for line in lines[1][j1:j2]]
        print("\n".join(f"{paint[l[0]]}{l}\033[0m" if l[0] in paint else l for l in out) + "\n" * bool(count))
    print(f"{total} lines differ (removed plus added)")


def table() -> str:
    """Markdown: for every section of the base what each of the other scripts does to it."""
    base = sections(ROOT / BASE)
    others = {name: sections(ROOT / name) for name in OTHERS}
    rows = [["section", "lines", *(f"`{name}`" for name in others)], ["---"] * (len(others) + 2)]
    for name, lines in base.items():
        counts = [changed(lines, other.get(name, [])) for other in others.values()]
        rows.append([name, str(len(lines)), *(str(count) if count else "same" for count in counts)])
    totals = [sum(changed(base.get(n, []), other.get(n, [])) for n in {**base, **other}) for other in others.values()]
    rows.append(["all", str(sum(map(len, base.values()))), *map(str, totals)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def objective(path: Path) -> str:
    """What the script's docstring says of its objective: its indented paragraphs but the last, which shows the usage,
    with the one ahead of them and those between."""
    paragraphs = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[:-1]
    indented = [k for k, text in enumerate(paragraphs) if text.startswith("    ")]
    return "\n\n".join(paragraphs[indented[0] - 1 : indented[-1] + 1])


def page() -> str:
    """HTML with all scripts, each distinct line once, and the edits of every pair."""
    scripts = {name: sections(ROOT / name) for name in ON_PAGE}
    number = {}  # {line: its number in the page}
    for line in itertools.chain.from_iterable(lines for script in scripts.values() for lines in script.values()):
        number.setdefault(line, len(number))
    data = {
        "lines": list(number),
        "scripts": {
            name: {part: [number[line] for line in lines] for part, lines in script.items()}
            for name, script in scripts.items()
        },
        "objectives": {name: objective(ROOT / name) for name in scripts},
        "edits": {
            f"{a},{b}": {part: edits(scripts[a][part], scripts[b].get(part, [])) for part in scripts[a]}
            for a, b in itertools.permutations(scripts, 2)
        },
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.read_text().replace("DATA", text)


def main(args: Args):
    missing = [str(path) for path in args.files if not path.is_file()]
    if bool(args.files) + args.table + bool(args.html) != 1:
        error = "give two scripts, or --table, or --html"
    elif args.files and (len(args.files) != 2 or missing):
        error = f"needs two scripts; missing: {', '.join(missing) or 'a name'}"
    elif args.html and not args.html.parent.is_dir():
        error = f"no folder {args.html.parent}"
    else:
        error = None
    if error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2)
    if args.table:
        print(table())
    elif args.html:
        args.html.write_text(page())
    else:
        show(*args.files, colour=sys.stdout.isatty())


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a pager that is left, head: no traceback
    main(tyro.cli(Args))
