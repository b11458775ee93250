"""``python -m plrhf.serving run=DIR``: the same as ``plrhf serve run=DIR``."""

from plrhf.cli.main import serve

if __name__ == "__main__":
    serve()
