"""``python scripts/check_tag.py TAG``: fails unless TAG is ``v`` and the package's version, and the
changelog has a section of that version. The version itself is ``kvq_plugin.__version__`` alone."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    tag = sys.argv[1]
    source = (ROOT / "kvq_plugin" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.M)[1]
    if tag != f"v{version}":
        raise SystemExit(f"tag {tag!r}: expected v{version}, the version in kvq_plugin/__init__.py")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## {re.escape(version)}\b", changelog, re.M):
        raise SystemExit(f"CHANGELOG.md has no section '## {version}': name 'Unreleased' after it")


if __name__ == "__main__":
    main()
