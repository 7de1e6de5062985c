//! Transformer kernels over slices, each as a scalar reference and in AVX2, chosen once at run time.
