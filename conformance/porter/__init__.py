"""The porter: moves the weights of hyper-connections between frameworks, layouts and dialects (mathematics.md).

`port.port` does it, `inspection.inspect` says what a checkpoint holds, `verdict.derive` what a port can be.
"""
