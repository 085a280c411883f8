"""The programs behind `make book`: the graph's facts, one chapter, the site, and the style of notebooks."""
