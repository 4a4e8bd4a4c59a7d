"""Ask a running server about all images below a folder, and write one CSV row for each.

Memory stays bounded whatever the number of images: at most `in_flight` requests are read and under way.

    vilu serve &
    python examples/async_folder.py photos answers.csv [--url 127.0.0.1:8001]
"""

import argparse
import asyncio
import csv
from pathlib import Path

from vilu.serving import AsyncClient

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


async def ask(folder: Path, output: Path, url: str) -> int:
    """Answers written."""
    images = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES)
    written = 0
    with output.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "confidence", "failure_probability", "accept", "error"])
        async with AsyncClient(url, batch_size=8, in_flight=4) as client:
            async for answer in client.stream(images):
                # A damaged image has an error and no answer; the others are not affected.
                figures = [answer.label, answer.confidence, answer.failure_probability, answer.accept]
                rows.writerow([answer.source, *(figures if answer.error is None else [""] * 4), answer.error or ""])
                written += 1
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--url", default="127.0.0.1:8001")
    given = parser.parse_args()
    print(f"{asyncio.run(ask(given.folder, given.output, given.url))} answers in {given.output}")


if __name__ == "__main__":
    main()
