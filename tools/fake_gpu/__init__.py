"""A CUDA device that computes nothing: project code runs on it on a machine without a GPU, forward and backward.

Tensors have shapes, dtypes and devices and no values (torch's FakeTensorMode), so a mix of devices or a wrong dtype
fails as on a GPU, and what a GPU would do can be counted: launches, bytes, FLOPs, host synchronizations, by line.

    import fake_gpu.device           # first of all, before torch
    from fake_gpu.counting import Counter
"""
