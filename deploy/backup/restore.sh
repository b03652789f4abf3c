#!/bin/sh
# Restores a backup of backup.sh into an empty database. Stop the gateway, dispatch and all workers before.
#
#   sh restore.sh --check BACKUP                                   is it complete, and as it was written?
#   PGHOST=… PGUSER=… PGPASSWORD=… PGDATABASE=… sh restore.sh BACKUP [FILES]
#
# PGDATABASE is there and has no tables; its owner asks, who may create databases: until all is restored it bears another
# name, so nobody finds half of it. FILES is the gateway's folder, empty. Attempts of the time of the backup are taken
# back, and what still lives of the time after it can write nothing here (restored.sql).
# Exit codes: 0 restored, 1 not restored, 2 wrong use.
#
#   RESTORE_JOBS=2                     tables that are written at once
#   MAINTENANCE_DATABASE=postgres      another database of the server, to rename from
#
# It needs pg_restore and psql of the backup's version or newer, and a server of that version or newer.
set -eu
umask 077
export LC_ALL=C

say() { echo "restore: $*" >&2; }
fail() { say "$*"; exit 1; }
asker() { id -un 2> /dev/null || id -u; }

# psql DATABASE OPTION…; statements come from stdin, since only there `:"name"` is a quoted name.
in_database() {
    database=$1
    shift
    psql --no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1 --dbname="$database" "$@"
}

# In the background, since a shell hears a signal only between two commands, but at once while it waits.
run() {
    "$@" &
    child=$!
    wait "$child" || { child='' && return 1; }
    child=''
}

rename() {
    in_database "${MAINTENANCE_DATABASE:-postgres}" --set=old="$1" --set=new="$2" << 'END'
ALTER DATABASE :"old" RENAME TO :"new";
END
}

stated() { sed -n "s/^$1=//p" "$backup/MANIFEST"; }

count_files() { find "$@" -type f | wc -l; }

check_backup() {
    if [ ! -d "$backup" ] || [ ! -r "$backup" ] || [ ! -x "$backup" ]; then
        fail "$backup is no folder that $(asker) may read; if it is there, as root: chown -R $(id -u):$(id -g) it"
    fi
    [ -f "$backup/MANIFEST" ] || fail "$backup has no MANIFEST: it is no backup, or not a whole one"
    [ "$(head -n 1 "$backup/MANIFEST")" = "stoker-backup 1" ] ||
        fail "$backup/MANIFEST is not of a backup that this can read"
    [ "$(sha256sum < "$backup/SHA256SUMS" | cut -d ' ' -f 1)" = "$(stated sums)" ] ||
        fail "$backup/SHA256SUMS is not what the backup wrote"
    parts=$(stated parts)
    if [ "$(wc -l < "$backup/SHA256SUMS")" -ne "${parts:-0}" ] ||
        [ "$(count_files "$backup/database" "$backup/files")" -ne "${parts:-0}" ]; then
        fail "$backup is not what the backup wrote: it has more or fewer files"
    fi
    (cd "$backup" && sha256sum --check --quiet SHA256SUMS >&2) || fail "$backup is not what the backup wrote"
}

check_target() {
    version=$(in_database "$PGDATABASE" --command='SHOW server_version_num') ||
        fail "the database $PGDATABASE at ${PGHOST:-its socket} does not answer, or refuses ${PGUSER:-$(asker)}"
    major=$((version / 10000))
    if [ "$major" -lt $(($(stated postgres) / 10000)) ] || [ "$major" -lt "$(stated pg_dump)" ]; then
        fail "the server is Postgres $major; the backup is of $(($(stated postgres) / 10000))," \
            "made by pg_dump $(stated pg_dump)"
    fi
    found=$(in_database "$PGDATABASE" << 'END'
SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname <> 'information_schema' AND n.nspname NOT LIKE 'pg\_%'
    AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')
END
    )
    [ "$found" = 0 ] || fail "the database $PGDATABASE is not empty: it has $found tables, indexes and the like"
    others=$(in_database "$PGDATABASE" << 'END'
-- backend_type is not told of others' sessions; of autovacuum, which gives way, there is no user.
SELECT string_agg(coalesce(nullif(application_name, ''), usename, 'a session'), ', ') FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND usesysid IS NOT NULL
END
    )
    [ -z "$others" ] || fail "the database $PGDATABASE is in use, stop these: $others"
    [ -n "$files" ] || return 0
    if [ ! -d "$files" ] || [ ! -w "$files" ]; then fail "$files is no folder that $(asker) may write to"; fi
    [ -z "$(find "$files" -type f | head -n 1)" ] || fail "$files is not empty"
}

copy_files() {
    for file in "$backup/files"/*; do
        [ ! -f "$file" ] || run cp -p "$file" "$files/" || return 1
    done
}

is_left_over() {
    found=$(in_database "${MAINTENANCE_DATABASE:-postgres}" --set=name="$restoring" 2> /dev/null << 'END'
SELECT count(*) FROM pg_database WHERE datname = :'name'
END
    ) && [ "$found" = 1 ]
}

# What there is of this restore, or of one before it.
not_finished() {
    if [ -n "$child" ] && kill "$child" 2> /dev/null; then wait "$child" || :; fi
    if [ -z "$renamed" ] && ! is_left_over; then return; fi
    say "the database $restoring is of a restore that has not finished. If none runs now, and once it is clear why:"
    say "  DROP DATABASE \"$restoring\"; CREATE DATABASE \"$PGDATABASE\";  empty the folder of files; then again"
}

is_check=''
if [ "${1:-}" = --check ]; then is_check=1; shift; fi
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p;}' "$0" >&2
    exit 2
fi
backup=${1%/}
files=${2:-}
after=$(dirname "$0")/restored.sql
check_backup
if [ -n "$is_check" ]; then
    say "$backup is whole: of $(stated time), schema $(stated schema), $(stated dump_kb) kB, files: $(stated files)"
    exit 0
fi
if [ -z "${PGDATABASE:-}" ]; then say "PGDATABASE: state which database"; exit 2; fi
if [ "$(stated files)" != none ] && [ -z "$files" ]; then
    say "the backup has files: state the gateway's folder"
    exit 2
fi
[ -f "$after" ] || fail "$after is not there: it belongs beside restore.sh"
restoring=${PGDATABASE}_restoring
child='' renamed=''
trap not_finished EXIT
trap 'exit 1' HUP INT TERM
check_target
began=$(date -u +%s)
told=$(rename "$PGDATABASE" "$restoring" 2>&1) || fail "the database $PGDATABASE could not be renamed: $told"
renamed=1

run pg_restore --exit-on-error --no-owner --no-privileges --jobs="${RESTORE_JOBS:-2}" --dbname="$restoring" \
    "$backup/database" || fail "pg_restore has failed"
# Without client_min_messages ANALYZE has a line for each system table.
run psql --no-psqlrc --quiet --single-transaction --set=ON_ERROR_STOP=1 --dbname="$restoring" \
    --set=moment="$(stated time)" --file="$after" --command='SET client_min_messages = error' --command=ANALYZE \
    > /dev/null || fail "the restored rows could not be made ready"
if [ "$(stated files)" != none ]; then
    copy_files || fail "the files could not be copied to $files"
    [ "$(count_files "$files")" -eq "$(stated files)" ] || fail "not all files have come to $files"
fi
sync
trap '' HUP INT TERM
rename "$restoring" "$PGDATABASE"
trap - EXIT
say "$(($(date -u +%s) - began)) s: the rows of $(stated time), schema $(stated schema), are the database $PGDATABASE"
say "next: empty Redis, RabbitMQ and Chroma, if they are of the time after; then 'stoker migrate', 'stoker doctor',"
say "then gateway, dispatch and workers, started anew (docs/backup.md)"
