#!/bin/sh
# What the image's entrypoint does at a first start, as far as compose asks for it: a superuser with its password, its
# database, passwords asked for from everywhere but this container.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    mkdir -p "$PGDATA"
    printf '%s\n' "$POSTGRES_PASSWORD" > /tmp/password
    # shellcheck disable=SC2086  # several options
    initdb -D "$PGDATA" -U "$POSTGRES_USER" --pwfile=/tmp/password $POSTGRES_INITDB_ARGS
    rm /tmp/password
    printf '\nhost all all all scram-sha-256\n' >> "$PGDATA/pg_hba.conf"
    printf "listen_addresses = '*'\n" >> "$PGDATA/postgresql.conf"
    pg_ctl -D "$PGDATA" -w -o "-c listen_addresses=''" start
    createdb -U "$POSTGRES_USER" "$POSTGRES_DB"
    pg_ctl -D "$PGDATA" -m fast -w stop
fi
# The wheel's server is built without lz4, the image's with it.
for word in "$@"; do
    shift
    case $word in -cwal_compression=lz4) word=-cwal_compression=pglz ;; esac
    set -- "$@" "$word"
done
exec "$@"
