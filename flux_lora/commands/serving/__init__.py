"""The rooms of ``scripts/serve``: Cog's server as a process, its log, its folder, and who watches over it."""
