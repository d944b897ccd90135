def shrunk_class(cls): return cls
