"""Train, export, start the real server, and ask it: the whole way in one program.

python examples/export_serve_ask.py [FOLDER]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from vilu import Checkpoint, load_clip
from vilu.data import embed, open_source
from vilu.export import export
from vilu.serving import Client, Server
from vilu.train import fit


def main(folder: Path) -> None:
    clip = load_clip()
    train = open_source(dataset="digits", split="train")
    head = fit(embed(train, clip)).head
    checkpoint = Checkpoint(head, clip.spec, clip.class_set(train.class_names), threshold=0.2)

    repository = folder / "model_repository"
    export(checkpoint, repository, clip=clip, max_batch_size=8)  # refused where the graphs differ from the eager model

    test = open_source(dataset="digits", split="test")
    with Server(repository, log=folder / "tritonserver.log") as server, Client(server.grpc_url) as client:
        for i, answer in enumerate(client.ask([test.read(i) for i in range(8)])):
            answer.raise_for_error()
            verdict = "accepted" if answer.accept else "refused"
            truth = test.class_names[test.labels[i]]
            print(f"{truth!r}: {answer.label!r}, P(failure) {answer.failure_probability:.2f}, {verdict}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with TemporaryDirectory() as temporary:
            main(Path(temporary))
