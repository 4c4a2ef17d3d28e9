"""The porter: moves the weights of hyper-connections between frameworks, layouts and dialects (docs/mathematics.md).

`port.port` ports a checkpoint, `inspection.inspect` shows its hyper-connections, and `verdict.derive` says how exact a
port can be.
"""
