"""An upgrade while batches run: processes of an earlier commit beside those of this one."""
