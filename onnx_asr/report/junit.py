"""The result of a check as a JUnit file, which services of continuous integration read."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from onnx_asr.files.outputs import printable, write_text
from onnx_asr.measuring.bars import option_of
from onnx_asr.measuring.checking import CheckResult


def write_junit(result: CheckResult, model: str, path: Path) -> None:
    """Write one test case per bar; a bar that was missed is a failure.

    Raises:
        OutputError: When the file cannot be written.
    """
    counts = {"tests": str(len(result.criteria)), "failures": str(len(result.missed)), "errors": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "onnx-resuscitate check"} | counts)
    for criterion in result.criteria:
        names = {"classname": printable(model), "name": f"{option_of(criterion.name)} {criterion.bar:.15g}"}
        case = ElementTree.SubElement(suite, "testcase", names)
        if not criterion.passed:
            ElementTree.SubElement(case, "failure", {"message": str(criterion)})
        ElementTree.SubElement(case, "system-out").text = f"measured {criterion.measured:.15g}"
    ElementTree.indent(root)
    write_text(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True).decode() + "\n", path)
