"""The benchmarks of vilu: each command measures one thing and writes its figures to bench/results.

| command                     | what it measures                                                                     |
|-----------------------------|--------------------------------------------------------------------------------------|
| python bench/head.py        | the ViLU head: fused or folded against eager forms; `--tune` finds launch settings    |
| python bench/throughput.py  | images a second of every way to run a CLIP with a head, in process and served         |
| python bench/new_names.py   | what unknown class names asked of `vilu_open` cost the users of `vilu`                |
| python bench/load.py        | a served model under traffic, hostile requests, overload and faults (bench/loadtest)  |
| python bench/train.py       | seconds of an epoch against the authors' loop; memory; how busy embedding keeps cores |
| python bench/table.py       | quality: every method and the ablation on the embedded data sets                      |
| python bench/small_data.py  | quality: a head against MCM, from few training images up                              |
| python bench/zoo.py         | the export of every large architecture: time, memory, error, speed                    |

Every command explains itself with `--help`. What they share is in `common.py`; `authors.py` is the one transcription of
the authors' model and training loop. A command is run as a file, so it first puts the repository's root on the path;
everything else imports `bench.NAME`.
"""
