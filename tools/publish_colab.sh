#!/bin/sh
# Makes runs/colab the one commit of the branch `colab`, where Colab opens the lessons. Run by .github/workflows/site.yml.
set -eu
cd "$(dirname "$0")/.."
GIT_INDEX_FILE="$(mktemp -d)/index"
GIT_AUTHOR_NAME="site workflow" GIT_AUTHOR_EMAIL="workflow@localhost"
GIT_COMMITTER_NAME="$GIT_AUTHOR_NAME" GIT_COMMITTER_EMAIL="$GIT_AUTHOR_EMAIL"
export GIT_INDEX_FILE GIT_AUTHOR_NAME GIT_AUTHOR_EMAIL GIT_COMMITTER_NAME GIT_COMMITTER_EMAIL
git --work-tree=runs/colab add --force --all
commit=$(git commit-tree "$(git write-tree)" -m "Publish the lessons for Colab")
git push --force origin "$commit:refs/heads/colab"
