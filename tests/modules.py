#!/usr/bin/env python3
"""Checks that the modules at the top of each crate do not depend on each other in a circle.

A module is a file or folder under src/. It depends on another if its code, tests and comments aside, names it. Prints
each circle with the names that close it, and exits with 1 if there is one; --graph prints every edge.
"""

import argparse
import re
import sys
from pathlib import Path

CRATES = ["membership", "proto", "storage", "c10d", "coordinator", "worker"]
PATH = re.compile(r"(?<![\w:])(?:\$?crate|super)::(\{|\w+)")


def code(text):
    """The code of a file, without comments and tests."""
    text = re.sub(r"//.*", "", text)
    text = re.sub(r"(?ms)^#\[cfg\(test\)\]\n[^\n]*mod \w+ \{.*?^\}", "", text)
    return re.sub(r"(?m)^#\[cfg\(test\)\]\n.*;$", "", text)


def group(text, start):
    """The first words of the paths in braces that open before `start`."""
    depth, at, word, words = 1, start, "", []
    while depth:
        char = text[at]
        if depth == 1 and (char in ",}"):
            words.append(word.strip())
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 1:
            word = "" if char in ",}" else word + char
        at += 1
    return [re.match(r"\w*", word)[0] for word in words]


def named(text, at_the_top):
    """The names right below the crate's root that code names."""
    for path in PATH.finditer(text):
        if path[0].startswith("super") and not at_the_top:
            continue
        yield from group(text, path.end()) if path[1] == "{" else [path[1]]


def graph(source):
    """Each module's dependencies, with the names by which it has them."""
    files = [file for file in source.rglob("*.rs") if "tests" not in file.with_suffix("").parts[-2:]]
    top = {file: file.relative_to(source).with_suffix("").parts for file in files}
    modules = {parts[0] for parts in top.values()} - {"main", "lib"}
    root = code((source / "lib.rs").read_text())
    reexported = {}
    for use in re.finditer(r"pub(?:\(crate\))? use (?:crate::|self::)?(\w+)::([^;]+);", root):
        for name in re.findall(r"\w+", use[2]):
            reexported[name] = use[1]
    edges = {module: {} for module in modules}
    for file, parts in top.items():
        if parts[0] not in modules:
            continue
        at_the_top = len(parts) == 1 or parts[1:] == ("mod",)
        for name in named(code(file.read_text()), at_the_top):
            to = name if name in modules else reexported.get(name)
            if to in modules and to != parts[0]:
                edges[parts[0]].setdefault(to, set()).add(str(file.relative_to(source)))
    return edges


def circles(edges):
    """The strongly connected components of more than one module."""

    def reached(start):
        seen, left = set(), [start]
        while left:
            for to in edges[left.pop()]:
                if to not in seen:
                    seen.add(to)
                    left.append(to)
        return seen

    reach = {module: reached(module) for module in edges}
    return {
        frozenset(other for other in edges if module in reach[other] and other in reach[module])
        for module in edges
        if module in reach[module]
    }


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--graph", action="store_true")
    options = options.parse_args()
    found = False
    for crate in CRATES:
        edges = graph(Path(crate) / "src")
        if options.graph:
            for module in sorted(edges):
                print(f"{crate}::{module} -> {', '.join(sorted(edges[module])) or 'nothing'}")
        count = sum(map(len, edges.values()))
        print(f"{crate}: {len(edges)} modules, {count} dependencies, {len(circles(edges))} circles")
        for circle in circles(edges):
            found = True
            print(f"  {{{', '.join(sorted(circle))}}}")
            for module in sorted(circle):
                for to in sorted(set(edges[module]) & circle):
                    print(f"    {module} -> {to} in {', '.join(sorted(edges[module][to]))}")
    sys.exit(found)


if __name__ == "__main__":
    main()
