-- What restore.sh does to rows that were just restored, in one transaction, before anybody can see them.
--
--   psql --single-transaction --set=ON_ERROR_STOP=1 --set=moment=TIME --file=restored.sql
--
-- TIME is the moment whose rows these are, such as 2026-11-29T20:39:12Z.
--
-- A process of the time after the backup may still live. It knows rows by numbers that this database would give out
-- again: fences of attempts, ids of shards. Both go on far above any that it can hold, so what it writes under them
-- finds no row. Two of its writes have no fence: how a webhook's delivery went (guarded by its id and number of tries)
-- and the size of a results file. And attempts that were under way at the backup's moment are taken back, as none of
-- them is heard of again.

\if :{?moment}
\else
DO $$ BEGIN RAISE EXCEPTION 'state the moment whose rows these are: --set=moment=2026-11-29T20:39:12Z'; END $$;
\endif

DO $$
DECLARE
    fence_step CONSTANT int8 := 1000000000; -- store.shards.RESTORE_STEP: more claims or rows than weeks bring
    int4_step CONSTANT int8 := 1000000; -- of engines, which are few
    one record;
BEGIN
    FOR one IN
        SELECT format('%I.%I', table_schema, table_name) AS place FROM information_schema.columns
        JOIN information_schema.tables USING (table_schema, table_name)
        WHERE table_schema = current_schema() AND column_name = 'fence' AND table_type = 'BASE TABLE'
    LOOP
        EXECUTE format('UPDATE %s SET fence = fence + %s', one.place, fence_step);
    END LOOP;
    FOR one IN
        SELECT format('%I.%I', schemaname, sequencename) AS place, coalesce(last_value, start_value) AS last,
            CASE WHEN max_value > 2147483647 THEN fence_step ELSE int4_step END AS step
        FROM pg_sequences WHERE schemaname = current_schema()
    LOOP
        PERFORM setval(one.place, one.last + one.step);
    END LOOP;
END $$;

-- As pipeline.give_back does: no crash is counted, and they are due at once. Hints of those that were sent are gone.
UPDATE shards SET state = 'pending', lease_until = NULL, not_before = clock_timestamp(),
    crashes = CASE WHEN state = 'running' AND done > done_at_claim THEN 0 ELSE crashes END
WHERE state IN ('dispatched', 'running');

-- What attempts had reserved is free again; money as after a crash: what they had asked for is billed.
UPDATE budgets SET reserved = 0, waits_until = NULL WHERE reserved <> 0 OR waits_until IS NOT NULL;
DELETE FROM reservations;
UPDATE money_budgets SET spent = spent + reserved, reserved = 0 WHERE reserved <> 0;
DELETE FROM money_reservations;

UPDATE documents SET state = 'pending', lease_until = NULL WHERE state = 'running';
UPDATE batches SET lease_until = clock_timestamp(),
    validations = greatest(0, validations - (lease_until > :'moment'::timestamptz)::int) -- no try
WHERE state = 'validating' AND lease_until IS NOT NULL;

-- A window is time in which there is somebody to work: it does not run from the backup to here.
UPDATE batches SET expires_at = expires_at + greatest(clock_timestamp() - :'moment'::timestamptz, interval '0')
WHERE ended_at IS NULL AND expires_at IS NOT NULL;

UPDATE files SET counting_until = NULL WHERE counting_until IS NOT NULL;
UPDATE cache_namespaces SET fitting_until = NULL WHERE fitting_until IS NOT NULL;

-- Chroma knows other passages than these, or none: the documents' worker tells it all of them again.
UPDATE collections SET lost = true;

DO $$
BEGIN
    IF to_regclass('schedule_runs') IS NOT NULL THEN -- since schema 0007
        UPDATE schedule_runs SET state = 'waiting', tries = tries - 1, lease_until = NULL,
            told = 'a backup of the time when it ran was restored' WHERE state = 'running';
        UPDATE schedule_runs SET sent_at = NULL WHERE state = 'waiting';
    END IF;
END $$;
