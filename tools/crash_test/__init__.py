"""`make crash-test`: every named point of an update, and every named fault, on the real agent process.

* bundles: small real models, good and bad;
* plane: a real control plane over real TLS, with faults to order for each device;
* door: the way from one device to it, which can be shut;
* device: one device: its state directory, its agent as a process, and how both are looked at;
* row: what a row of the table is, and how one is run and judged;
* rows_*: the table;
* page: docs/reliability.md, from build/crash-test.json.
"""
