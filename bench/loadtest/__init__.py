"""Load tests of a served model: what users, hostile clients and accidents do to it, with every answer checked.

The command is `python bench/load.py`, with `--faults` for part (d) and `--recording` for what a record costs. It
trains a small head over the embedded CLIP, exports it, starts the real server and goes through

    (a) mixed traffic over all models, gRPC and HTTP, closed and open loop, while the server's memory is measured
    (b) hostile requests with good ones in between, then the same behind `vilu guard`, and what the guard costs
    (c) an overload, far above what the server can do
    (d) faults: processes killed, models broken, class sets replaced, /dev/shm filled, clients that never read

Each part ends in promises: what was promised, the figures that were seen, and every problem. One broken promise makes
the command's exit code 1.

| file                                 | what it holds                                                            |
|--------------------------------------|--------------------------------------------------------------------------|
| phases.py                            | the parts above and what each must show                                  |
| world.py, questions.py               | images and labels, what the eager model answers, requests with checks    |
| traffic.py                           | sends questions and keeps the ledger: right, wrong, refused or lost       |
| hostile.py                           | sends hostile requests; what counts as refused; the server's own faults  |
| hostile_requests.py, damaged_images.py | makes them from a seed                                                 |
| scene.py, faults.py, client_faults.py | a server as an operator starts it; faults done to it, and by clients    |
| processes.py, memory.py              | CPU time and memory of the server's processes                            |
| recording.py                         | what `vilu serve --record` costs                                         |
| wire.py                              | requests as bytes, for gRPC and raw HTTP                                 |
| load_generator.py                    | load without checks, as cheap as possible: used by bench/throughput.py   |
| report.py                            | the figures as Markdown                                                  |
"""
