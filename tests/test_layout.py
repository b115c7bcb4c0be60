"""The shape of the code: imports point one way, nothing is long, and no configuration key is dead."""
import ast
import dataclasses
import pathlib

from asib_jax.objectives import steps
from asib_jax.recipe import recipe

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "asib_jax"

# The order to read the package in: a file imports only from files above it.
READING_ORDER = (
    "errors", "paths", "plain_pickle", "typed_groups", "streams", "losses", "schedules", "freezing", "parallel", "hosts", "device_check",
    "data", "data.archives", "data.cifar100", "data.splits", "data.sources", "data.augment", "data.batches",
    "models.architecture", "models.layers", "models.resnet", "models.convnext", "models.efficientnet", "models.mobilenet",
    "models.shufflenet", "models.wide_resnet", "models.vgg", "models.kd_model", "models.ib_mbm", "models", "models.ensemble",
    "checkpoint", "torch_pickle", "weights", "pretrained", "recipe", "checks", "idle_keys", "state", "steps", "cost",
    "feed", "nonfinite", "signals", "experiment", "snapshots", "loop", "feature_bank", "stored_views", "evaluate",
    "reporting", "build", "overlap", "run", "teacher_store", "provenance", "teachers", "a_step", "b_step", "finished",
    "export", "results", "train", "preparation", "resume", "plan", "dry_run", "workloads", "benchmark", "command_line",
)
MAX_LINES, MAX_LAUNCH_LINES, MAX_FUNCTION = 300, 79, 60

# A group of keys in a recipe: the class that holds it. "" is the recipe itself.
GROUPS = {"": recipe.Recipe, "dataset": recipe.DatasetRecipe, "student": recipe.StudentRecipe,
          "teachers": recipe.TeacherRecipe, "schedule": recipe.ScheduleRecipe}
CHECKED_ONLY = {"num_stages", "platform"}  # compared with the length of student_epochs_per_stage, and with the devices


def files(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
    """`models.resnet` for asib_jax/models/resnet.py, `models` for its __init__; "" for the package itself."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


def imports(tree: ast.AST) -> set[str]:
    """Every module and every name in a module that `tree` imports, anywhere in it, dotted."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def upward(sources: dict[str, str], order: tuple[str, ...]) -> list[str]:
    """Imports that do not point up in `order`, as "importer <- imported"; sources: module name -> text."""
    wrong = []
    for name, text in sources.items():
        own = {module.removeprefix("asib_jax.") for module in imports(ast.parse(text))}
        above = {*order[: order.index(name)], name.rpartition(".")[0]}  # `from asib_jax.data import x` names both
        wrong += [f"{name} <- {module}" for module in sorted(own & set(order) - above)]
    return wrong


def test_every_file_has_its_place_in_the_reading_order():
    modules = {module_name(path) for path in files("asib_jax")} - {""}
    assert modules == set(READING_ORDER)
    assert len(READING_ORDER) == len(set(READING_ORDER))


def test_a_file_imports_only_from_files_above_it():
    sources = {module_name(path): path.read_text() for path in files("asib_jax")}
    assert not imports(ast.parse(sources.pop("")))
    assert upward(sources, READING_ORDER) == []


def test_a_wrong_import_is_found():
    order = ("a", "b", "c")
    assert upward({"b": "from asib_jax import a, c"}, order) == ["b <- c"]
    assert upward({"a": "def f():\n    from asib_jax.b import g"}, order) == ["a <- b"]
    assert upward({"a": "import asib_jax.c"}, order) == ["a <- c"]
    assert upward({"c": "from asib_jax.b import g\nfrom asib_jax import a"}, order) == []


def test_the_library_knows_no_launcher_and_no_config():
    """Only recipe.py reads configuration keys, and it takes any mapping."""
    for path in files("asib_jax"):
        roots = {name.partition(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert not roots & {"ml_collections", "configs", "launch"}, path
    for path in files("configs"):
        roots = {name.partition(".")[0] for name in imports(ast.parse(path.read_text()))}
        assert roots <= {"ml_collections", "configs"}, path


def test_linen_stays_in_models():
    for path in files("asib_jax", "configs", "launch"):
        uses = any(name.startswith("flax.linen") for name in imports(ast.parse(path.read_text())))
        assert not uses or path.parent == PACKAGE / "models", path


def functions(tree: ast.AST) -> dict[str, int]:
    """Length in lines of every function in `tree`, by name and line."""
    return {f"{node.name}:{node.lineno}": node.end_lineno - node.lineno + 1 for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


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
        elif isinstance(node, ast.arg) and last_name(node.annotation) in classes:
            bound.setdefault(node.arg, set()).add(classes[node.annotation.id])
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
    tree = ast.parse((PACKAGE / "recipe.py").read_text())
    classes = {cls.__name__: group for group, cls in GROUPS.items()}
    return {(classes[cls.name], function.name): {
                (classes[cls.name], node.attr) for node in ast.walk(function)
                if isinstance(node, ast.Attribute) and last_name(node.value) == "self"}
            for cls in tree.body if isinstance(cls, ast.ClassDef) and cls.name in classes
            for function in cls.body if isinstance(function, ast.FunctionDef)}


def dead(groups: dict[str, type], sources: list[str]) -> list[str]:
    """Fields of the groups that no source reads, neither directly nor through a property of their class."""
    live = set().union(*map(reads, sources))
    properties, todo = property_reads(), list(live)
    while todo:
        for key in properties.get(todo.pop(), ()):
            if key not in live:
                live.add(key)
                todo.append(key)
    return [f"{group}.{field.name}".lstrip(".") for group, cls in groups.items() for field in dataclasses.fields(cls)
            if (group, field.name) not in live]


def consumers() -> list[str]:
    """The code that acts on keys: all but what reads, checks and describes them."""
    others = ("recipe.py", "checks.py", "idle_keys.py", "cost.py", "plan.py", "dry_run.py", "export.py", "workloads.py",
              "benchmark.py")
    return [path.read_text() for path in files("asib_jax", "launch") if path.name not in others]


def test_every_key_is_read_by_the_code():
    assert set(dead(GROUPS, consumers())) == CHECKED_ONLY


def test_a_dead_key_is_found():
    """A made-up key; one whose name another group has; one that only an unread property reads."""
    made_up = dataclasses.make_dataclass("MadeUp", [("made_up", int)], bases=(recipe.Recipe,), frozen=True)
    schedule = dataclasses.make_dataclass("Schedule", [("weights", str)], bases=(recipe.ScheduleRecipe,), frozen=True)
    found = dead(GROUPS | {"": made_up, "schedule": schedule}, consumers())
    assert set(found) == CHECKED_ONLY | {"made_up", "schedule.weights"}
    source = ("def f(recipe):\n  options = recipe.dataset\n"
              "  return options.name, [t.name for t in recipe.teachers], recipe.a_epochs")
    read = {"dataset.name", "teachers.name", "teacher_adapt_epochs", "cccp_nt", "use_cccp", "dataset", "teachers"}
    assert set(dead(GROUPS, [source])) == set(dead(GROUPS, [""])) - read


def test_every_weight_given_to_a_loss_is_read():
    """The fields of ATerms and BTerms, read as `terms.X` or through a property of theirs, in steps.py."""
    tree = ast.parse((PACKAGE / "steps.py").read_text())
    by_function = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for cls, names in ((steps.ATerms, ("a_loss",)), (steps.BTerms, ("b_loss", "_distillation"))):
        loads = {node.attr for name in names for node in ast.walk(by_function[name])
                 if isinstance(node, ast.Attribute) and last_name(node.value) == "terms"}
        assert {field.name for field in dataclasses.fields(cls)} <= loads
