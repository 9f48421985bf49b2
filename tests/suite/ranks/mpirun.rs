//! Processes of `mpirun`.
