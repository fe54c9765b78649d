"""The keys of the config's schema."""


def nodes(node, key=""):
    """(dotted key, schema node) of every key, sections and list entries included."""
    for name, child in node.get("properties", {}).items():
        yield f"{key}{name}", child
        yield from nodes(child, f"{key}{name}.")
        yield from nodes(child.get("items", {}), f"{key}{name}[].")
