"""What a store holds, against its manifest and layout: one pass per kind of file, which opening and
verifying share. Each function gives the faults of one file, as texts that go after its name."""
