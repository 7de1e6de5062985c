//! Collectives between ranks that are threads of a process or MPI processes, with a ledger of every byte.
