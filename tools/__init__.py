"""The offline side: checkpoints -> networks -> bundles -> engines, and what measures them. Imports torch."""
