"""The evaluator's tables: scores of rows on targets, beside each other and against the random row."""

from common.pairs import paired
from common.rows import Row

FULL = ("cifar100", "cifar10", "aircraft", "cars", "cub200", "dogs", "flowers")  # KRR-ST's seven, from CIFAR-100
TABLES = {  # KRR-ST's Tables 1 to 3 by their columns, and the rows that stand above krr_st there
    1: ("cifar100", FULL, ("none", "random:labels", "kmeans:labels", "dsa", "dm", "mtt", "kip", "frepo")),
    2: ("tiny_imagenet", ("tiny_imagenet", *FULL[1:]),
        ("none", "random:labels", "kmeans:labels", "dsa", "dm", "mtt", "frepo")),
    3: ("imagenet", ("cifar10", "cifar100", *FULL[2:]), ("none", "random:labels", "frepo")),
}  # fmt: skip

RANKED = ("random", "all_real:labels")  # the rows that hard-label recovery and improvement over random need
Results = dict[tuple[str, str, str, str], dict[str, dict]]  # (protocol, target, model, row) -> {metric: mean, std, ...}


def entry_in_words(metric: str, of: dict) -> str:
    """Mean ± std: per cent for accuracies, a fraction for the matching error."""
    scale, digits = (1, 3) if metric == "match" else (100, 1)
    return f"{scale * of['mean']:.{digits}f} ± {scale * of['std']:.{digits}f}"


def grid_of(rows: list[str], columns: list[str], values: dict[tuple[str, str], str]) -> str:
    """Text with a line for each row, "-" where there is nothing."""
    width = max(len(row) for row in rows) + 2
    wide = [max(len(column), *(len(values.get((row, column), "-")) for row in rows)) + 2 for column in columns]
    lines = [" " * width + "".join(f"{column:>{w}}" for column, w in zip(columns, wide, strict=True))]
    for row in rows:
        cells = [f"{values.get((row, column), '-'):>{w}}" for column, w in zip(columns, wide, strict=True)]
        lines.append(f"{row:{width}}" + "".join(cells))
    return "\n".join(lines)


def tables(results: Results, rows: list[str]) -> str:
    """A table for each protocol and model; its columns are targets and measures."""
    blocks = []
    models = list(dict.fromkeys(model for _, _, model, _ in results if model != "-")) or ["-"]
    for use in dict.fromkeys(use for use, *_ in results):
        for model in models:
            shown = {place: of for place, of in results.items() if place[0] == use and place[2] in (model, "-")}
            if all(place[2] == "-" for place in shown) and model != "-":
                continue
            several = len({target for _, target, _, _ in shown}) > 1
            alone = len({metric for of in shown.values() for metric in of}) == 1
            values, columns = {}, {}
            for (_, target, _, row), of in shown.items():
                for metric in of:
                    column = metric if not several else target if alone else f"{target} {metric}"
                    columns[column] = None
                    values[row, column] = entry_in_words(metric, of[metric])
            order = sorted(columns, key=lambda column: not column.endswith("match"))  # the first row may not have it
            present = [row for row in dict.fromkeys(rows) if any(place[3] == row for place in shown)]
            blocks.append(f"{use}, {model}\n" + grid_of(present, order, values))
    return "\n\n".join(blocks)


def krr_st_table(number: int, results: Results, rows: list[Row]) -> str:
    """Rows and columns as KRR-ST's table has them; "-" where no set was given for a row, or no target."""
    fine = {place: of for place, of in results.items() if place[0] == "finetune"}
    found = list(dict.fromkeys(target for _, target, _, _ in fine))
    order = TABLES[number][1]
    columns = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    shown = {"none": "w/o pre", "random:labels": "random", "kmeans:labels": "kmeans"}
    shown |= {name: f"{name}, own targets" for name in ("random", "kmeans")}
    words, listed = [row.word for row in rows], TABLES[number][2]
    lines = {row.name: shown.get(row.word, row.name) if words.count(row.word) == 1 else row.name for row in rows}
    names = []
    for word in dict.fromkeys((*listed, *words)):
        names += [lines[row.name] for row in rows if row.word == word] or [shown.get(word, word)]
    blocks = []
    for model in dict.fromkeys(model for _, _, model, _ in fine):
        values = {(lines[row], target): entry_in_words("finetune", of["finetune"])
                  for (_, target, each, row), of in fine.items() if each == model}  # fmt: skip
        blocks.append(f"KRR-ST's Table {number}, {model}\n" + grid_of(names, columns, values))
    return "\n\n".join(blocks)


def ranking_of(results: Results, rows: list[Row]) -> dict[str, dict]:
    """For each set with labels and model: hard-label recovery and improvement over random, in accuracy.

    recovery: of networks trained on all real data minus of those trained on the set, both with hard labels, as many
    updates and the same schedule (lower is better); improvement: of networks trained on the set with its own labels
    minus of those trained on as many random real images by the same recipe (DD-Ranking, arXiv:2505.13300). Mean over
    networks that started alike, with the standard error of the difference.
    """
    found = {}
    for row in rows:
        if not row.beside or row.kind == "features":
            continue
        names = {"set": row.name, "hard": row.beside.get("hard", row).name}
        names |= {"all": row.beside["all_real:labels"].name, "random": row.beside["random"].name}
        for use, target, model, name in results:
            if use == "scratch" and name == row.name:
                pair = {which: results["scratch", target, model, of] for which, of in names.items()}
                found[f"{row.name}, {model}, {target}"] = dict(
                    hard_label_recovery=paired(pair, "all", "hard", "accuracy"),
                    improvement_over_random=paired(pair, "set", "random", "accuracy"),
                )
    return found


def against_random(results: Results, rows: list[Row]) -> list[dict]:
    """The scores of each set, and of its other neighbours, minus those of its random row, network by network."""
    random = {}
    for row in rows:
        for each in (row, *row.beside.values()):
            if "random" in row.beside and each is not row.beside["random"]:
                random.setdefault(each.name, row.beside["random"].name)
    found = []
    for (use, target, model, row), of in results.items():
        other = results.get((use, target, model, random.get(row)))
        for metric in [metric for metric in of if other and metric in other]:
            pair = paired({"row": of, "random": other}, "row", "random", metric)
            found.append(dict(protocol=use, target=target, model=model, row=row, metric=metric) | pair)
    return found
