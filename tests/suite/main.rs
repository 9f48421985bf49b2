//! Everything seen from outside: each command as a process, and the library against its references.
