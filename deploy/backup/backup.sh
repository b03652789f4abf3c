#!/bin/sh
# A backup of Stoker, made while it runs: Postgres as of one moment, and the files that the gateway keeps.
#
#   PGHOST=… PGUSER=… PGPASSWORD=… PGDATABASE=… sh backup.sh FOLDER [FILES]
#
# Makes FOLDER/stoker-TIME and prints its path; the folder has that name only when all of it is there. FILES is the
# gateway's folder (STOKER_GATEWAY__FILES). Where Postgres is and who asks is libpq's own matter (PG…, ~/.pgpass), so no
# password stands in a command line. Exit codes: 0 made, 1 not made and nothing left behind, 2 wrong use.
#
#   BACKUP_JOBS=2      tables that are read at once
#   BACKUP_KEEP=       how many backups to keep, this one included; older ones are deleted. Not set: all
#   BACKUP_COMPRESS=   as pg_dump's --compress; not set: zstd:1 if pg_dump has it, else gzip
#
# It needs pg_dump, pg_restore and psql of the server's version or newer. docs/backup.md says how to restore.
set -eu
umask 077
export LC_ALL=C

say() { echo "backup: $*" >&2; }
fail() { say "$*"; exit 1; }
asker() { id -un 2> /dev/null || id -u; }

ask() { psql --no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1 --command="$1"; }

# In the background, since a shell hears a signal only between two commands, but at once while it waits.
run() {
    "$@" &
    child=$!
    wait "$child" || { child='' && return 1; }
    child=''
}

clean() {
    if [ -n "$child" ] && kill "$child" 2> /dev/null; then wait "$child" || :; fi
    rm -rf "$work"
}

pick_compression() {
    run pg_dump --format=custom --schema-only --table=alembic_version --compress=zstd:1 --file=/dev/null 2> /dev/null &&
        echo zstd:1 || echo 1
}

# Copies what is not there yet. A file never changes under its name: what the last backup has already is linked.
copy_files() {
    for file in "$files"/*; do
        blob=${file##*/}
        case $blob in *.partial) continue ;; esac
        if [ ! -f "$file" ] || [ -e "$work/files/$blob" ]; then continue; fi
        if [ -n "$last" ] && cmp -s "$file" "$last/files/$blob" && ln "$last/files/$blob" "$work/files/$blob"; then
            continue
        fi
        cp -p "$file" "$work/files/$blob" && continue
        [ ! -e "$file" ] || return 1
        rm -f "$work/files/$blob" # deleted at this moment
    done
}

count_files() { find "$@" -type f | wc -l | tr -d ' '; }

# Of every file, or none of any: sort alone would hide that one could not be read.
sum_files() {
    find database files -type f -exec sha256sum {} + > unsorted && sort -k 2 unsorted > SHA256SUMS && rm unsorted &&
        [ "$(wc -l < SHA256SUMS)" -eq "$(count_files database files)" ]
}

# As the dump has it: a migration may have come since the question at the beginning.
dumped_schema() {
    pg_restore --file=- --data-only --table=alembic_version "$work/database" | sed -n '/^COPY /{n;p;}'
}

# What was begun and not finished by one that was killed goes after a day; what BACKUP_KEEP does not keep goes now.
delete_old() {
    if [ -n "$keep" ]; then
        whole=$(find "$into" -mindepth 2 -maxdepth 2 -path '*/stoker-*Z/MANIFEST' | wc -l)
        for one in "$into"/stoker-*Z; do
            [ "$whole" -gt "$keep" ] || break
            [ -f "$one/MANIFEST" ] || continue
            mv "$one" "$one.old" || return 1 # so that half of it never passes for a backup
            whole=$((whole - 1))
        done
    fi
    find "$into" -maxdepth 1 \( -name 'stoker-*Z.old' -o -name 'stoker-*Z.partial' -mtime +0 \) -exec rm -rf {} +
}

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p;}' "$0" >&2
    exit 2
fi
into=${1%/}
files=${2:-}
keep=${BACKUP_KEEP:-}
child='' last=''
case $keep in *[!0-9]* | 0) say "BACKUP_KEEP: $keep is no count"; exit 2 ;; esac
if [ ! -d "$into" ] || [ ! -w "$into" ]; then fail "$into is no folder that $(asker) may write to"; fi
if [ -n "$files" ] && { [ ! -d "$files" ] || [ ! -r "$files" ]; }; then fail "$files is no folder that can be read"; fi
ask 'SELECT 1' > /dev/null || fail "Postgres at ${PGHOST:-its socket} does not answer, or refuses ${PGUSER:-$(asker)}"
ask 'SELECT version_num FROM alembic_version' > /dev/null ||
    fail "no tables of Stoker there, or none that this role may read"
server=$(ask 'SHOW server_version_num')
database=$(ask 'SELECT current_database()')
database_kb=$(ask 'SELECT pg_database_size(current_database()) / 1024')
tools=$(pg_dump --version | sed 's/^[^0-9]*\([0-9]*\).*/\1/')

for one in "$into"/stoker-*Z; do [ ! -f "$one/MANIFEST" ] || last=$one; done
began=$(date -u +%s)
time=$(date -u +%Y-%m-%dT%H:%M:%SZ)
name=stoker-$(echo "$time" | tr -d :-)
work=$into/$name.partial
if [ -e "$into/$name" ] || ! mkdir "$work"; then fail "$name: another backup of this second"; fi
trap clean EXIT
trap 'exit 1' HUP INT TERM
mkdir "$work/files"

# Before the rows and after them: what is uploaded meanwhile is in the second, what is deleted meanwhile in the first.
[ -z "$files" ] || copy_files || fail "$files could not be copied"
compress=${BACKUP_COMPRESS:-$(pick_compression)}
run pg_dump --format=directory --jobs="${BACKUP_JOBS:-2}" --compress="$compress" --no-owner --no-privileges \
    --file="$work/database" || fail "pg_dump has failed"
[ -z "$files" ] || copy_files || fail "$files could not be copied"

schema=$(dumped_schema)
[ -n "$schema" ] || fail "the dump does not say of which schema it is"
(cd "$work" && sum_files) || fail "the sums could not be made"
dump_kb=$(du -sk "$work/database" | cut -f 1)
count=$(count_files "$work/files")
files_kb=$(du -sk "$work/files" | cut -f 1)
seconds=$(($(date -u +%s) - began))
cat > "$work/MANIFEST" << END
stoker-backup 1
time=$time
database=$database
schema=$schema
postgres=$server
pg_dump=$tools
database_kb=$database_kb
dump_kb=$dump_kb
files=$([ -n "$files" ] && echo "$count" || echo none)
files_kb=$files_kb
seconds=$seconds
parts=$(count_files "$work/database" "$work/files")
sums=$(sha256sum < "$work/SHA256SUMS" | cut -d ' ' -f 1)
END
sync
mv "$work" "$into/$name"
sync
delete_old || say "what is older could not be deleted"
say "$seconds s: $dump_kb kB of a database of $database_kb kB, schema $schema; $count files of $files_kb kB"
echo "$into/$name"
