#!/usr/bin/env bash
# Download what does not come with the repository:
#
#   ./download.sh [checkpoint | coco-val | coco-train | all]...   (default: coco-val checkpoint)
#
#   checkpoint   the paper's model_15.pth -> checkpoints/, its data.zip -> data/paper/
#   coco-val     COCO val2017, 1 GB       -> data/coco/val2017/
#   coco-train   COCO train2017, 19 GB    -> data/coco/train2017/
#
# Run it again after an interruption: it goes on where it stopped, and skips what is there. A file or
# folder has its final name only when it is whole. Nobody publishes hashes: sizes, checksums inside
# the archives, the number of images and the checkpoint's weights are checked.
#
#   APM_DOWNLOAD_BASE   a mirror of all four files, instead of the paper's server and COCO's
#   APM_DOWNLOAD_STALL  seconds without data after which a connection is given up (default 30)
#   PYTHON              interpreter (default: .venv/bin/python, else python3)
set -euo pipefail
CDPATH='' cd -- "$(dirname -- "$0")"

PAPER=${APM_DOWNLOAD_BASE:-https://www.cs.ucf.edu/~rmodi/apm}
COCO=${APM_DOWNLOAD_BASE:-http://images.cocodataset.org/zips}
ATTEMPTS=5
# Reads tensors only: nothing in the file is run.
VERIFY_CHECKPOINT='
import sys, apm
try:
    apm.load_model(sys.argv[1])
except ValueError as error:
    print("not the paper\x27s checkpoint:", error)
    sys.exit(2)
'
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi

die() {
    echo "download.sh: $*" >&2
    exit 1
}

# unavailable URL REASON
unavailable() {
    die "$1: $2; the bundled checkpoints/apm_small.safetensors needs no download"
}

file_size() {
    if [[ -f $1 ]]; then wc -c <"$1" | tr -d ' '; else echo 0; fi
}

call_curl() {
    curl --fail --location --silent --connect-timeout 20 \
        --speed-limit 1 --speed-time "${APM_DOWNLOAD_STALL:-30}" "$@"
}

# The size that the server announces, 0 if it does not.
remote_size() {
    local headers
    headers=$(call_curl --head --max-time 60 "$1") || headers='' # the download will tell why
    tr -d '\r' <<<"$headers" | awk '
        tolower($1) ~ /^http\// {n = 0} # a redirect: its length is not the file'"'"'s
        tolower($1) == "content-length:" {n = $2}
        END {print n + 0}'
}

# check_disk BYTES FOLDER URL
check_disk() {
    local free
    free=$(df -Pk "$2" | awk 'NR == 2 {print $4}')
    ((free >= $1 / 1024)) ||
        die "$3: needs $(($1 / 1048576 + 1)) MB, $PWD/$2 has $((free / 1024)) MB free"
}

# fetch URL PART COPIES: download into PART, going on where it ends. COPIES is how many times the
# file's size the disk will have to hold.
fetch() {
    local url=$1 part=$2 size attempt status
    size=$(remote_size "$url")
    mkdir -p "$(dirname "$part")"
    check_disk $((size * $3 - $(file_size "$part"))) "$(dirname "$part")" "$url"
    for ((attempt = 1; attempt <= ATTEMPTS; attempt++)); do
        if ((size > 0 && $(file_size "$part") == size)); then return; fi
        if ((size > 0 && $(file_size "$part") > size)); then rm -f "$part"; fi
        status=0
        call_curl --continue-at - --output "$part" "$url" || status=$?
        case $status in
            0)
                if ((size == 0 || $(file_size "$part") == size)); then return; fi
                rm -f "$part" # not what was announced: nothing to go on from
                ;;
            5 | 6 | 7) unavailable "$url" "cannot be reached (no network?)" ;;
            22) # 404 and its like; or PART was whole already, of a size nobody knew
                [[ $size == 0 && -s $part ]] || unavailable "$url" "refused by the server (not there?)"
                rm -f "$part"
                ;;
            23) die "$part: cannot be written" ;;
            33) rm -f "$part" ;; # the server cannot resume
        esac
    done
    unavailable "$url" "could not be downloaded whole in $ATTEMPTS attempts, try again to go on"
}

# verify PART ARGUMENTS: run Python on what was downloaded. Status 2 says that PART is bad, and it is
# removed; what else fails (a full disk, a signal, no Python) says nothing about it, and it is kept.
verify() {
    local part=$1 reason status=0
    shift
    reason=$("$PYTHON" "$@" 2>&1) || status=$?
    reason=${reason##*$'\n'}
    case $status in
        0) ;;
        2)
            rm -f "$part"
            die "$(basename "$part" .part): could not be verified, removed ($reason)"
            ;;
        *) die "$part: kept, $PYTHON failed with status $status; try again (${reason:-killed?})" ;;
    esac
}

# fetch_archive URL FOLDER [how to unpack]: download and unpack an archive.
fetch_archive() {
    local url=$1 folder=$2 part=data/${1##*/}.part
    shift 2
    if [[ -d $folder ]]; then
        echo "$folder: there already"
        return
    fi
    fetch "$url" "$part" 2
    verify "$part" misc_scripts/unpack_archive.py --input "$part" --output "$folder" "$@"
    rm -f "$part"
    echo "$folder: done"
}

fetch_checkpoint() {
    local target=checkpoints/model_15.pth part=checkpoints/model_15.pth.part reason
    if [[ -f $target ]]; then
        echo "$target: there already"
    else
        reason=$("$PYTHON" -c 'import apm' 2>&1) || die "$PYTHON cannot verify the checkpoint" \
            "(${reason##*$'\n'}): pip install -r requirements.txt"
        fetch "$PAPER/model_15.pth" "$part" 1
        verify "$part" -c "$VERIFY_CHECKPOINT" "$part"
        mv "$part" "$target"
        echo "$target: done"
    fi
    fetch_archive "$PAPER/data.zip" data/paper
}

fetch_coco() {
    fetch_archive "$COCO/$1.zip" "data/coco/$1" --inside "$1" --images "$2"
}

main() {
    local target next
    (($# > 0)) || set -- coco-val checkpoint
    for target; do
        case $target in
            checkpoint | coco-val | coco-train | all) ;;
            -h | --help)
                sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]##*/}"
                return
                ;;
            *)
                echo "download.sh: $target: expected checkpoint, coco-val, coco-train or all" \
                    "(see --help)" >&2
                exit 2
                ;;
        esac
    done
    if [[ " $* " == *' all '* ]]; then set -- coco-val coco-train checkpoint; fi
    command -v curl >/dev/null || die "needs curl"
    mkdir -p data
    if command -v flock >/dev/null; then
        exec 9>data/.download.lock
        flock -n 9 || die "another download.sh is at work here"
    fi
    for target; do
        case $target in
            checkpoint)
                fetch_checkpoint
                next="predict_test_image.py --checkpoint checkpoints/model_15.pth"
                ;;
            coco-val)
                fetch_coco val2017 5000
                next="visualize_coco.py --input data/coco/val2017 --limit 50"
                ;;
            coco-train)
                fetch_coco train2017 118287
                next="misc_scripts/resize_coco_images.py --input data/coco/train2017"
                ;;
        esac
        echo "next: python $next"
    done
}

main "$@"
