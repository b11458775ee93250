"""``python -m plrhf.serving run=DIR``: the same as ``plrhf serve run=DIR``."""

import sys

from plrhf.cli.commands import run

if __name__ == "__main__":
    run("serve", sys.argv[1:], shown="python -m plrhf.serving")
