"""What the failures of a run come from.

`measured` says what the run itself shows: an exception, one mode, one dtype, one family. `child` asks the
implementation more, in a process of its own: which function it computes (`identify`) and from which size on it is wrong
(`places`). `diagnose` puts both together and keeps to a time.
"""
