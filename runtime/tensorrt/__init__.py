"""Runs an engine directory's compiled graphs: TensorRT on a GPU, onnxruntime in its place on a CPU."""
