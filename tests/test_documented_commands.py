"""Every `sam3lt ...` that the README, the pages and the help show is one that the command line takes."""

import importlib
import pathlib
import re
import shlex
import subprocess

import pytest

from sam3lt_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (
  "README.md",
  "tpu/README.md",
  *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
)
_COMMAND = re.compile(r"^\s*(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?sam3lt (.+)$", re.MULTILINE)


def commands(text):
  """The arguments of each command; not of those that leave something out ("...")."""
  joined = re.sub(r"\\\n\s*", "", text)
  found = [shlex.split(line, comments=True) for line in _COMMAND.findall(joined)]
  return [argv for argv in found if "..." not in argv and "|" not in argv]


def parser(verb):
  made = cli.Parser(prog=f"sam3lt {verb}")
  importlib.import_module(cli.VERBS[verb][0]).add_arguments(made)
  return made


@pytest.mark.parametrize("page", PAGES)
def test_pages(page):
  text = (ROOT / page).read_text(encoding="utf-8")
  blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
  for argv in commands(blocks):
    parser(argv[0]).parse(argv[1:])


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help(verb):
  examples = commands(parser(verb).epilog)
  assert examples
  for argv in examples:
    parser(argv[0]).parse(argv[1:])


def test_the_pages_show_what_to_do():
  assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) >= 3
  verbs = {argv[0] for page in PAGES for argv in commands((ROOT / page).read_text(encoding="utf-8"))}
  assert verbs >= {"demo", "segment", "batch", "finetune", "eval", "distill", "export", "info", "app"}


def test_git_passes_over_what_the_pages_commands_write():
  pages = ("README.md", "docs/index.md", "docs/phrases.md", "docs/jobs.md", "docs/checkpoints.md")
  text = "".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
  blocks = "".join(re.findall(r"```(?:bash|python)\n(.*?)```", text, re.DOTALL))
  written = re.findall(r"""(?:--out|-o|--data| >|save\()\s+['"]?([\w./]+)""", blocks)
  written += re.findall(r"python -m convert\.(?:from|to)_\w+ \S+ (\S+)", blocks)
  assert len(written) > 5
  if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True).returncode:
    pytest.skip("no git checkout")
  for name in written:
    given = [name.rstrip("/"), name.rstrip("/") + "/"]  # a file or a folder
    done = subprocess.run(["git", "check-ignore", *given], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, f"{name} is not in .gitignore"
