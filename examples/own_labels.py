"""Ask a running server about labels of your own, which it has never seen.

vilu serve &
python examples/own_labels.py photo.jpg "a cat" "a dog" [--url 127.0.0.1:8001]
"""

import argparse

from vilu.serving import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("labels", nargs="+")
    parser.add_argument("--url", default="127.0.0.1:8001")
    given = parser.parse_args()

    with Client(given.url) as client:
        (answer,) = client.ask([given.image], labels=given.labels, details=True)
    answer.raise_for_error()
    print(f"{answer.label}: P(failure) {answer.failure_probability:.2f}")
    for label, probability in answer.top:
        print(f"  {probability:6.1%} {label}")


if __name__ == "__main__":
    main()
