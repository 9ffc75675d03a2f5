"""Fetches the real teacher, texts and tokenizers into the cache: `python tools/fetch_assets.py [NAME ...]`.

Without names, all of them. What is there already is not fetched again. The cache is `~/.cache/jaxdistill`, or the
directory in the environment variable JAXDISTILL_CACHE.
"""

from __future__ import annotations

import argparse
import sys

from jaxdistill.assets import ASSETS, AssetError, asset


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = "; ".join(f"{name}: {wanted.title}" for name, wanted in ASSETS.items())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to fetch (default: all). {listed}")
    parser.add_argument("--verify", action="store_true", help="read every cached file again and check its sha256")
    options = parser.parse_args(arguments)
    try:
        for name in options.names or ASSETS:
            print(asset(name, verify=options.verify))
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
