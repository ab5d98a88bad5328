"""XML files of others: the tree of elements, and no document type.

A document type can define entities that unfold to gigabytes or name other files; annotations have
no use for one.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat


class _DocumentType(Exception):
    """A document type was met."""


def read_xml(path: Path) -> Element:
    """The root element of a file.

    Raises:
        ValueError: The file cannot be read, is no XML, or declares a document type.
    """
    builder = TreeBuilder()
    # Expat itself says when a document type begins; in whatever encoding, no search of the bytes
    # would miss it.
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = _refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(path.read_bytes(), True)
    except FileNotFoundError as error:
        raise ValueError(f"data.path: there is no file '{path}'") from error
    except OSError as error:
        raise ValueError(f"data.path: '{path}' cannot be read ({error})") from error
    except expat.ExpatError as error:
        raise ValueError(
            f"data.path: '{path}' is no XML or damaged ({error}); expected is <annotation> with an "
            "<object> for each box"
        ) from error
    except _DocumentType as error:
        raise ValueError(
            f"data.path: '{path}' declares a document type (DOCTYPE), which annotations need not "
            "and which may define entities without end; refused"
        ) from error
    return builder.close()


def _refuse(*declared: object) -> None:
    raise _DocumentType
