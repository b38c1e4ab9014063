"""The figures of bench/results/ on the documentation site, which has only what lies in docs/."""

from pathlib import Path

from mkdocs.structure.files import File


def on_files(files, config):
    root = Path(config.config_file_path).parent
    for figure in sorted(root.glob("bench/results/**/*.png")):
        files.append(File.generated(config, figure.relative_to(root).as_posix(), abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown, **_):
    return markdown.replace("](../bench/results/", "](bench/results/")
