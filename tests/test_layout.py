"""The shape of the code: imports point one way, nothing is long, and no configuration key is dead."""

import ast
import dataclasses
import graphlib
import pathlib

import pytest

from asib_jax import recipe
from asib_jax.objectives.a_loss import ATerms
from asib_jax.objectives.b_loss import BTerms

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "asib_jax"

# The wings from the ground up: a file imports from its own and from those before. "" is the package itself: the ground
# floor are two files there, the rest are the story.
WINGS = ("ground", "data", "models", "objectives", "recipe", "engine", "weights", "record", "story", "tools")
GROUND = ("errors", "streams")
MAX_LINES, MAX_LAUNCH_LINES, MAX_FUNCTION = 300, 79, 60

# A group of keys in a recipe: the class that holds it. "" is the recipe itself.
GROUPS = {
    "": recipe.Recipe,
    "dataset": recipe.DatasetRecipe,
    "student": recipe.StudentRecipe,
    "teachers": recipe.TeacherRecipe,
    "schedule": recipe.ScheduleRecipe,
}
# Compared with the length of student_epochs_per_stage; what the data make of it is in teacherK.classes.
CHECKED_ONLY = {"num_stages", "specialists"}


def files(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
    """`models.resnet` for asib_jax/models/resnet.py, `models` for its __init__; "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports(tree: ast.AST) -> set[str]:
    """Every module, and every name in a module, that `tree` imports, anywhere in it, dotted."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports; sources: module -> text."""

    def module(found: str) -> str:
        name = found.removeprefix("asib_jax.")
        return name if name in sources else name.rpartition(".")[0]

    return {
        name: {module(found) for found in imports(ast.parse(text))} & sources.keys() for name, text in sources.items()
    }


def wing(module: str) -> str:
    folder = module.partition(".")[0]
    return folder if folder in WINGS else "ground" if module in GROUND else "story"


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """Imports from a wing above, as "importer <- imported"."""
    return sorted(
        f"{name} <- {module}"
        for name, modules in arrows.items()
        for module in modules
        if WINGS.index(wing(module)) > WINGS.index(wing(name))
    )


def cycle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules of one cycle of imports; none: there is none."""
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    sources = {module_name(path): path.read_text() for path in files("asib_jax")}
    assert imports(ast.parse(sources.pop(""))) == {"asib_jax.tools.notebook.distil"}  # when it is asked for
    found = graph(sources)
    assert len(found) > 40 and sum(map(len, found.values())) > 150
    return found


def test_every_folder_is_a_wing_and_every_wing_is_there(arrows):
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == {*WINGS} - {"ground", "story"}
    assert {wing(module) for module in arrows} == {*WINGS}


def test_imports_between_wings_go_one_way(arrows):
    assert upward(arrows) == []


def test_no_imports_go_round_within_a_wing(arrows):
    assert cycle(arrows) == []


def test_a_wrong_import_is_found():
    def found(**more):
        sources = {
            "errors": "",
            "data": "",
            "data.x": "def f():\n    import asib_jax.errors",
            "data.y": "",
            "train": "",
            "tools": "",
            "tools.z": "from asib_jax import train\nfrom asib_jax.data.x import f",
        }
        arrows = graph(sources | more)
        return upward(arrows), set(cycle(arrows))

    assert found() == ([], set())
    assert found(errors="from asib_jax.data.x import f") == (["errors <- data.x"], {"errors", "data.x"})
    assert found(data="from asib_jax.tools import z")[0] == ["data <- tools.z"]
    assert found(train="import asib_jax.tools.z")[0] == ["train <- tools.z"]
    around = {"data.x": "from asib_jax.data import y", "data.y": "from asib_jax.data.x import f"}
    assert found(**around) == ([], {"data.x", "data.y"})


def test_the_library_knows_no_launcher_and_no_config():
    """It takes any mapping for a configuration, and configurations know of it what keys there are."""
    for path in files("asib_jax"):
        roots = {name.partition(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert not roots & {"ml_collections", "configs", "launch"}, path
    for path in files("configs"):
        found = imports(ast.parse(path.read_text()))
        assert {name.partition(".")[0] for name in found} <= {"ml_collections", "configs", "flax", "asib_jax"}, path
        assert all(name.startswith("asib_jax.recipe.") for name in found if name.startswith("asib_jax")), path


def test_linen_stays_in_models():
    for path in files("asib_jax", "configs", "launch"):
        uses = any(name.startswith("flax.linen") for name in imports(ast.parse(path.read_text())))
        assert not uses or path.parent == PACKAGE / "models", path


def functions(tree: ast.AST) -> dict[str, int]:
    """Length in lines of every function in `tree`, by name and line."""
    return {
        f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_files_and_functions_are_short():
    nested = "class A:\n  def f(self):\n    def g():\n      pass\n    return g"
    assert functions(ast.parse(nested)) == {"f:2": 4, "g:3": 2}
    for path in files("asib_jax", "configs", "launch"):
        text = path.read_text()
        assert len(text.splitlines()) <= (MAX_LAUNCH_LINES if path.parent.name == "launch" else MAX_LINES), path
        long = {name: length for name, length in functions(ast.parse(text)).items() if length > MAX_FUNCTION}
        assert not long, f"{path}: {long}"


# --- dead keys -------------------------------------------------------------------------------------------------------


def last_name(node: ast.AST) -> str:
    """`c` for a.b.c, a.b.c[0] and c; "" for anything else."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def group_of(node: ast.AST) -> set[str]:
    """The group `node` stands for by itself: recipe.dataset, run.recipe.teachers[k], recipe.model.student, recipe."""
    while isinstance(node, ast.Subscript):
        node = node.value
    name = last_name(node)
    inside = isinstance(node, ast.Attribute) and last_name(node.value) in ("recipe", "model")
    return {""} if name == "recipe" else {name} if inside and name in GROUPS else set()


def bindings(function: ast.AST) -> dict[str, set[str]]:
    """Local names that stand for groups: assigned, iterated over, or annotated as one."""
    classes = {cls.__name__: group for group, cls in GROUPS.items()}
    bound: dict[str, set[str]] = {}

    def bind(target: ast.AST, groups: set[str]) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                bound.setdefault(node.id, set()).update(groups)

    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                tuples = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                for one, value in zip(target.elts, node.value.elts) if tuples else [(target, node.value)]:
                    bind(one, group_of(value))
        elif isinstance(node, ast.For | ast.comprehension):
            bind(node.target, set().union(*map(group_of, ast.walk(node.iter))) - {""})
        elif isinstance(node, ast.arg) and node.annotation:
            names = {last_name(part) for part in ast.walk(node.annotation)}  # of a union, all
            bound.setdefault(node.arg, set()).update(classes[name] for name in names & classes.keys())
    return bound


def reads(source: str) -> set[tuple[str, str]]:
    """(group, key) of every key `source` reads: an attribute loaded from a recipe or from one of its groups."""
    found = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        bound = bindings(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                local = bound.get(node.value.id, set()) if isinstance(node.value, ast.Name) else set()
                found |= {(group, node.attr) for group in local | group_of(node.value)}
    return found


def property_reads() -> dict[tuple[str, str], set[tuple[str, str]]]:
    """(group, property) -> the (group, attribute) pairs of `self` it reads, for every property of a group's class."""
    classes = {cls.__name__: group for group, cls in GROUPS.items()}
    return {
        (classes[cls.name], function.name): {
            (classes[cls.name], node.attr)
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and last_name(node.value) == "self"
        }
        for path in files("asib_jax/recipe")
        for cls in ast.parse(path.read_text()).body
        if isinstance(cls, ast.ClassDef) and cls.name in classes
        for function in cls.body
        if isinstance(function, ast.FunctionDef)
    }


def dead(groups: dict[str, type], sources: list[str]) -> list[str]:
    """Fields of the groups that no source reads, neither directly nor through a property of their class."""
    live = set().union(*map(reads, sources))
    properties, todo = property_reads(), list(live)
    while todo:
        for key in properties.get(todo.pop(), ()):
            if key not in live:
                live.add(key)
                todo.append(key)
    return [
        f"{group}.{field.name}".lstrip(".")
        for group, cls in groups.items()
        for field in dataclasses.fields(cls)
        if (group, field.name) not in live
    ]


def consumers() -> list[str]:
    """The code that acts on keys: all but what declares and checks them, and what tells of a run or re-enacts it."""
    return [
        path.read_text()
        for path in files("asib_jax", "launch")
        if path.parent not in (PACKAGE / "recipe", PACKAGE / "tools")
    ]


def test_every_key_is_read_by_the_code():
    assert set(dead(GROUPS, consumers())) == CHECKED_ONLY


def test_a_dead_key_is_found():
    """A made-up key; one whose name another group has; one that only an unread property reads."""
    made_up = dataclasses.make_dataclass("MadeUp", [("made_up", int, 0)], bases=(recipe.Recipe,), frozen=True)
    schedule = dataclasses.make_dataclass(
        "Schedule", [("weights", str, "")], bases=(recipe.ScheduleRecipe,), frozen=True
    )
    found = dead(GROUPS | {"": made_up, "schedule": schedule}, consumers())
    assert set(found) == CHECKED_ONLY | {"made_up", "schedule.weights"}
    source = (
        "def f(recipe):\n  options = recipe.dataset\n"
        "  return options.name, [t.name for t in recipe.teachers], recipe.a_epochs"
    )
    read = {"dataset.name", "teachers.name", "teacher_adapt_epochs", "cccp_nt", "use_cccp", "dataset", "teachers"}
    assert set(dead(GROUPS, [source])) == set(dead(GROUPS, [""])) - read


def test_every_weight_given_to_a_loss_is_read():
    """The fields of ATerms and BTerms, read as `terms.X`, each by the functions of its loss's file."""
    for cls, name in ((ATerms, "a_loss"), (BTerms, "b_loss")):
        tree = ast.parse((PACKAGE / "objectives" / f"{name}.py").read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        loads = {
            node.attr
            for function in functions
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute) and last_name(node.value) == "terms"
        }
        assert {field.name for field in dataclasses.fields(cls)} <= loads
