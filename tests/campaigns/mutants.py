"""Break each invariant of docs/ARCHITECTURE.md on purpose and see the test named there turn red: python -m tests.campaigns.mutants [I70 I71].

Without names it breaks all of them. Works on a copy of the tree. A mutant that survives, or that no longer applies, fails.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """In `file`, `old` becomes `new`; then `test` must fail."""

    invariant: str
    file: str
    old: str
    new: str
    test: str


KILL = "tests/acceptance/test_kill.py::"
FAULTS = "tests/integration/test_faults.py::"
QUEUE = "tests/sql/test_queue.py::"
STREAM = "tests/sql/test_read_stream.py::"
SEGMENTS = "tests/sql/test_segments.py::"
SPILL = "tests/properties/test_spill.py::test_each_comes_whole_at_its_commit_or_not_at_all"
SESSIONS = "tests/integration/test_sessions.py::"
MIRROR_RULE = "tests/properties/test_mirror_rule.py::test_two_sides_agree"
MIRROR_CLOCK = "tests/mirrors/test_clock.py::test_a_clock_that_steps_back_divides_nobody"
FAILOVER = "tests/acceptance/test_failover.py::test_"
TAKEOVER = (
    "tests/acceptance/test_takeover.py"
    "::test_the_other_takes_over_within_five_seconds_and_the_first_comes_back_as_stand_by"
)
CAPTURE = "tests/integration/test_capture.py::test_a_"
KEYS = "tests/integration/test_keys.py::test_"
ISOLATION = "tests/sql/test_isolation.py::test_"
LOCKS = "tests/integration/test_locks.py::test_"
SNAPSHOT = (
    "tests/acceptance/test_backfill_kill.py::test_snapshots_and_backfills_while_the_bridge_is_killed[pg15-pgoutput]"
)
LEAVING = "tests/integration/test_client_leaving.py::test_"
ORDER = "tests/integration/test_client_order.py::test_"
LOSS = "tests/integration/test_client_loss.py::test_"
ENDING = "tests/integration/test_client_handlers.py::test_"
SHARDS = "tests/sql/test_shards.py::test_"
LARGE = f"{KILL}test_killed_inside_a_large_transaction_and_restarted_with_other_tables[pg15-wal2json]"
APPLY = "tests/integration/test_apply.py::test_"
UNINSTALL = "tests/acceptance/test_uninstall.py::test_"
ALERTS = "tests/alerts/test_bridge.py::"
PAGES = "tests/web/pages/test_actions.py::"
REVERTS = "tests/revert/test_"
VERDICT = "tests/unit/test_verdict.py::test_both_ways"
MUTANTS = (
    Mutant("I1", "cdcbridge/bridge/session.py", "self._stream.confirm(written, self._progress.confirm())",
           "self._stream.confirm(self._progress.received, self._progress.received)",
           f"{FAULTS}test_nothing_is_confirmed_while_its_append_hangs[pg15-pgoutput]"),
    Mutant("I2", "cdcbridge/store/log.py", "            first = self._begin(connection, len(batch.rows))\n",
           "            self._finish(connection, batch, None, None)\n            connection.execute('commit')\n"
           "            connection.execute('begin')\n            first = self._begin(connection, len(batch.rows))\n",
           f"{KILL}test_killed_at_each_step[pg15-pgoutput-rows copied]"),
    Mutant("I3", "cdcbridge/routing/collector.py", "self._skip_through = self._done.ordinal if event.commit_lsn == self._done.commit_lsn else -1",
           "self._skip_through = -1", LARGE),
    Mutant("I4", "cdcbridge/routing/collector.py", "        self._begin = event\n",
           "        self._begin = event\n        self.end_lsn = max(self.end_lsn, event.commit_lsn)\n",
           "tests/unit/test_collector.py::test_an_open_transaction_is_never_reported_as_ended"),
    Mutant("I5", "sql/internal/append.sql", "if newest.epoch is distinct from begin_append.epoch then", "if false then",
           f"{FAULTS}test_an_append_of_an_older_epoch_writes_nothing"),
    Mutant("I6", "cdcbridge/checks/decision.py", "if facts.source.slot_lsn > end:", "if False:",
           "tests/unit/test_decision.py::test_what_check_and_run_refuse_in_the_same_words[slot was advanced]"),
    Mutant("I6", "cdcbridge/bridge/preparation.py", "if held.slot_lsn > self.tail.end_lsn:", "if False:",
           f"{FAULTS}test_a_slot_that_is_moved_after_the_facts_were_found[pg15-wal2json]"),
    Mutant("I7", "cdcbridge/bridge/preparation.py", "if tail.unfinished is not None:", "if False:", LARGE),
    Mutant("I8", "cdcbridge/routing/router.py", "if schema in self._own or", "if",
           "tests/integration/test_stream.py::test_everything_but_the_bridges_own_schema[pg15-pgoutput]"),
    Mutant("I9", "sql/internal/settle.sql",
           "l.claim_id = given_claim and l.not_visible_until > moment\n      and cardinality", "l.claim_id = given_claim\n      and cardinality",
           f"{QUEUE}test_a_receipt_is_good_for_one_delivery"),
    Mutant("I10", "sql/internal/shards.sql",
           "and pg_try_advisory_xact_lock(class, take_shards.consumer_id * 64 + shard) then", "then",
           f"{QUEUE}test_many_receivers_get_each_message_once_and_never_more_than_max_in_flight"),
    Mutant("I10", "sql/internal/claim.sql", "            if not (pg_try_advisory_lock(sharing) and pg_advisory_unlock(sharing)) then\n                if", "            if false then\n                if",
           f"{SHARDS}a_large_claim_leaves_to_others_what_it_does_not_use[pg15]"),
    Mutant("I10", "sql/internal/shards.sql", "used[k.shard % number] + coalesce(k.used, 1000000)", "used[k.shard % number]",
           f"{SHARDS}a_large_claim_leaves_to_others_what_it_does_not_use[pg15]"),
    Mutant("I10", "sql/internal/claim.sql", "'hints'::regclass::oid::int, told_lock(", "0, told_lock(",
           f"{SHARDS}a_hundred_receivers_in_their_transactions_get_a_message_each[pg15-queue]"),
    Mutant("I10", "sql/internal/shards.sql", "        exit when shares or cardinality(look.capacity) >= wanted;\n", "        exit;\n",
           f"{SHARDS}a_claim_with_shards_of_its_own_takes_what_others_leave_in_theirs[pg15]"),
    Mutant("I11", "cdcbridge/source/catalog.py",
           "        doubtful = not self.captures(schema, table) and self._in_doubt(versions)\n", "        doubtful = False\n",
           "tests/integration/test_stream.py"
           "::test_partitions_that_are_gone_before_the_bridge_can_look_at_them[pg15-wal2json-down]"),
    Mutant("I12", "sql/internal/per_consumer/claim_in_order.sql", "elsif held_keys = '{}' and ahead is null then", "elsif true then",
           "tests/sql/test_fifo.py::test_many_receivers_never_hold_one_key_twice_and_never_swap_two"),
    Mutant("I12", "sql/internal/per_consumer/claim_in_order.sql", "language plpgsql stable as $$\ndeclare\n    last constant", "language plpgsql volatile as $$\ndeclare\n    last constant",
           "tests/sql/test_fifo.py::test_a_message_that_moves_while_a_claim_looks_still_holds_its_key[pg15]"),
    Mutant("I13", "sql/internal/claim_in_order.sql", "safe := case when jsonb", "safe := case when false and jsonb",
           "tests/sql/test_publish.py::test_a_fifo_consumer_never_passes_a_message_that_can_still_commit"),
    Mutant("I14", "sql/internal/hints.sql", "safe_seq := max_safe_seq('messages_seq')",
           "safe_seq := pg_sequence_last_value('messages_seq')",
           "tests/sql/test_publish.py::test_a_message_that_commits_late_is_not_left_behind"),
    Mutant("I14", "sql/internal/hints.sql", "safe_claim := max_safe_seq('claim_ids_seq')",
           "safe_claim := pg_sequence_last_value('claim_ids_seq')",
           "tests/sql/test_publish.py::test_a_claim_that_commits_late_is_not_forgotten"),
    Mutant("I14", "sql/internal/per_consumer/live_waiting.sql", "array(select distinct p from unnest(passed) p where p < floor order by p)",
           "'{}'::bigint[]", "tests/sql/test_fifo.py::test_what_claims_have_passed_by_is_not_forgotten"),
    Mutant("I15", "sql/internal/retention.sql", "        if unfinished then\n            return c.name;", "        if false then\n            return c.name;",
           "tests/sql/test_retention.py::test_a_segment_stays_while_a_message_of_it_is_unfinished"),
    Mutant("I16", "sql/internal/claim_in_order.sql", "coalesce(array_agg(f.d order by f.ord, f.tie), '{}')",
           "coalesce(array_agg(f.d order by (f.d).claim_id), '{}')",
           "tests/sql/test_fifo.py::test_an_expired_delivery_that_was_delivered_alone_stays_the_first"),
    Mutant("I17", "sql/api/read_stream.sql", "safe := case when w.topics <> '{}' then max_safe_seq() end;",
           "safe := null;", f"{STREAM}test_no_reader_passes_a_seq_that_can_still_commit"),
    Mutant("I17", "sql/internal/read_stream.sql", "safe := least(max_safe_seq(), upper_end);",
           "safe := least(pg_sequence_last_value('messages_seq'), upper_end);",
           f"{STREAM}test_what_a_group_does_not_want_moves_its_offset_on"),
    Mutant("I18", "sql/api/commit_offset.sql", "or at.id <> fence or", "or",
           f"{STREAM}test_under_a_lease_nobody_else_reads_the_partition_until_it_ends"),
    Mutant("I19", "sql/api/read_stream.sql", ", end_of_era(w, spots));", ");",
           f"{SEGMENTS}test_the_order_of_a_key_stays_when_partitions_are_added"),
    Mutant("I20", "sql/internal/retention.sql", "        total := total + leave_behind(beyond);\n", "",
           f"{SEGMENTS}test_retention_tells_a_group_that_was_too_slow"),
    Mutant("I21", "sql/internal/settle.sql", "select unnest(seqs) except all select unnest(marked)",
           "select unnest(seqs) except select unnest(marked)",
           f"{QUEUE}test_a_claim_of_which_a_part_was_extended_ends_as_a_whole"),
    Mutant("I22", "sql/internal/hints.sql", "(not l.partly or not exists", "(true or not exists",
           "tests/sql/test_fifo.py::test_a_key_is_free_when_all_of_it_is_acked_though_its_claim_holds_others"),
    Mutant("I23", "sql/internal/compaction.sql", "t.partition, false\n              from taken t where t.old_key is not null",
           "t.partition, false\n              from taken t where false",
           "tests/properties/test_compact.py::test_a_reader_comes_to_the_state_wherever_it_stood"),
    Mutant("I23", "sql/internal/compaction.sql", "o.seq < m.seq and o.lost is null", "false",
           "tests/properties/test_compact.py::test_a_reader_comes_to_the_state_wherever_it_stood"),
    Mutant("I24", "cdcbridge/routing/overtaken.py", "            self.changed[key] = xid\n", "            pass\n", SNAPSHOT),
    Mutant("I24", "cdcbridge/routing/overtaken.py", "return whole < self.xmin or whole not in self.running", "return True",
           "tests/integration/test_backfill.py"
           "::test_what_the_stream_brings_before_any_snapshot_sees_it_is_not_followed_by_the_old_row"),
    Mutant("I24", "cdcbridge/backfill/worker.py", "if writer in first]", "if False]",
           "tests/integration/test_backfill.py::test_a_transaction_that_writes_is_waited_for_and_named"),
    Mutant("I25", "cdcbridge/store/log.py", "            for chunk, sent in batch.chunks:\n",
           "            connection.execute('commit')\n            __import__('time').sleep(0.05)\n"
           "            connection.execute('begin')\n            for chunk, sent in batch.chunks:\n", SNAPSHOT),
    Mutant("I26", "cdcbridge/store/leadership.py", "SILENCE: Final = 2.5", "SILENCE: Final = 25.0", f"{TAKEOVER}[stopped]"),
    Mutant("I26", "cdcbridge/bridge/supervisor.py", "            refuse_other_source(self._config, store)\n", "",
           f"{TAKEOVER}[cut off from the source]"),
    Mutant("I27", "cdcbridge/checks/decision.py", "    if branch < tail.known_lsn and slot_lsn <= branch:\n", "    if False:\n", f"{FAILOVER}what_the_standby_did_not_have_"
           "is_told_by_a_gap_and_new_changes_are_not_taken_for_it"),
    Mutant("I27", "cdcbridge/bridge/preparation.py", "go_on=branch.gap.first", "go_on=branch.gap.last", f"{FAILOVER}what_the_standby_did_not_have_"
           "is_told_by_a_gap_and_new_changes_are_not_taken_for_it"),
    Mutant("I28", "cdcbridge/changes/in_progress.py", "if subxid not in turn.transaction.aborted:", "if True:", SPILL),
    Mutant("I28", "cdcbridge/changes/in_progress.py", "                if self.waiting:\n                    return\n", "", SPILL),
    Mutant("I28", "cdcbridge/bridge/supervisor.py", "                store.forget_spilled()\n", "",
           "tests/integration/test_in_progress.py::test_transactions_in_progress_while_the_bridge_is_killed[15]"),
    Mutant("I27", "cdcbridge/store/facts.py", "return self.end_lsn if self.unfinished is None else", "return self.end_lsn if True else",
           f"{FAULTS}test_a_branch_beside_a_transaction_that_was_appended_in_part"),
    Mutant("I28", "cdcbridge/changes/in_progress.py", "            if transaction.messages:\n", "            if False:\n",
           "tests/integration/test_in_progress.py::test_a_logical_message_that_was_rolled_back_with_its_savepoint_is_not_delivered[15]"),
    Mutant("I29", "cdcbridge/database/session.py", "and current_setting(s.name, true) <> s.value", "and false",
           f"{SESSIONS}test_every_type_is_the_same_as_change_and_as_row_of_a_snapshot[pg15-pgoutput-environment]"),
    Mutant("I29", "cdcbridge/database/__init__.py", '"" if pooler else session.startup_options(', '"" if True else session.startup_options(',
           f"{SESSIONS}test_a_standby_is_read_under_a_serializable_default"),
    Mutant("I29", "sql/internal/claim_queue.sql", "'at', time_text(at)", "'at', at",
           f"{SESSIONS}test_sql_functions_do_not_depend_on_the_session_that_calls_them"),
    Mutant("I29", "cdcbridge/database/session.py", '    "row_security": "off",\n', "",
           f"{SESSIONS}test_postgresql_itself_refuses_rows_that_row_security_would_hide[pg18-pgoutput]"),
    Mutant("I27", "cdcbridge/bridge/session.py", "if timeline is not None and not", "if False and not",
           f"{FAILOVER}a_standby_is_a_source_and_stays_one_when_it_is_promoted"),
    Mutant("I30", "cdcbridge/bridge/session.py", "            if found := self._ready.watched.losses():",
           "            if found := []:", f"{CAPTURE}publication_that_is_altered_is_mended_and_what_it_left_out_is_told"
           "[pg18-running-table taken out]"),
    Mutant("I30", "cdcbridge/bridge/publishing.py", "    if before is not None:\n", "    if False:\n",
           f"{CAPTURE}publication_that_is_altered_is_mended_and_what_it_left_out_is_told[pg18-down-table taken out]"),
    Mutant("I30", "cdcbridge/source/capture.py", "            if oid != known[name]:\n", "            if False:\n",
           f"{CAPTURE}named_table_that_is_replaced_is_captured_again[pg15-pgoutput-running-swapped]"),
    Mutant("I31", "cdcbridge/changes/keys.py", "if primary_key and (full or not identity or set(primary_key) <= set(identity)):",
           "if primary_key:", f"{KEYS}the_key_of_an_identity_index_beside_a_primary_key[pg15-pgoutput-live]"),
    Mutant("I31", "cdcbridge/changes/wal2json.py", "if not sent or set(table.primary_key) == set(sent) else sent",
           "if True else sent",
           f"{KEYS}a_table_that_is_gone_has_its_own_keys_and_no_generated_columns[pg15-wal2json-behind]"),
    Mutant("I31", "cdcbridge/bridge/supervisor.py", "    catalog.meet_all()\n", "",
           f"{KEYS}a_primary_key_that_changes_while_the_bridge_is_behind[pg15-pgoutput-full]"),
    Mutant("I32", "cdcbridge/changes/pgoutput.py", "        if not leaves:\n", "        if True:\n",
           f"{KEYS}a_root_with_full_identity_and_partitions_without[pg15-pgoutput]"),
    Mutant("I33", "cdcbridge/source/publications.py", 'sql.SQL("table only {}")', 'sql.SQL("table {}")',
           "tests/integration/test_publications.py::test_children_that_it_lists_are_taken_out[pg15]"),
    Mutant("I33", "cdcbridge/source/tables.py", "i.indislive and i.indisvalid and i.indimmediate and i.indpred is null,",
           "i.indislive and i.indisvalid and i.indpred is null,",
           "tests/integration/test_shapes.py::test_the_identity_is_what_the_server_takes_for_one"),
    Mutant("I33", "sql/source/identity.sql", "                  when 'd' then not keyed\n", "                  when 'd' then false\n",
           "tests/integration/test_event_trigger.py::test_a_table_that_is_created_later_without_a_key[pg15-pgoutput]"),
    Mutant("I40", "sql/internal/isolation.sql", "    perform refuse_changed(consumer_id, array(select r.claim_id from unnest(receipts) r));\n    return", "    return",
           f"{ISOLATION}what_another_session_did_since_the_snapshot_is_not_overwritten[pg18-shortened-repeatable read]"),
    Mutant("I40", "sql/internal/settle.sql", "    if above_read_committed() then\n        return", "    if false then\n        return",
           f"{ISOLATION}what_another_session_did_since_the_snapshot_is_not_overwritten[pg18-acked-repeatable read]"),
    Mutant("I40", "sql/internal/publish.sql", "if above_read_committed() and not sees_consumers() then", "if false then",
           f"{ISOLATION}a_publisher_whose_snapshot_misses_a_change_of_consumers[pg18-added-serializable]"),
    Mutant("I40", "sql/internal/append.sql", "    perform require_read_committed('begin_append()');\n", "",
           f"{ISOLATION}what_needs_a_younger_snapshot_refuses[pg18-repeatable read]"),
    Mutant("I41", "cdcbridge/database/patience.py", 'LOCK_TIMEOUT: Final = "500ms"', 'LOCK_TIMEOUT: Final = "5s"',
           f"{LOCKS}nobody_else_waits[pg18-migrate a table-receiver]"),
    Mutant("I41", "sql/internal/consumers.sql", "set search_path from current set lock_timeout = '500ms' as $$\ndeclare\n    consumer consumers;",
           "set search_path from current set lock_timeout = '10s' as $$\ndeclare\n    consumer consumers;",
           f"{LOCKS}nobody_else_waits[pg18-remove a queue-receiver]"),
    Mutant("I41", "sql/api/seek_partitions.sql", "where not pg_try_advisory_xact_lock(partition_lock(c.id, w)) limit 1", "where false limit 1",
           f"{LOCKS}seek_holds_no_partition_while_it_waits_for_another"),
    Mutant("I41", "sql/internal/hints.sql", "        for update of o skip locked))\n", "        for update of o))\n",
           f"{LOCKS}housekeeping_passes_by_what_a_receiver_in_its_transaction_has_replaced"),
    Mutant("I42", "sql/internal/publish.sql", "        perform ensure_segment(new_seq);\n", "        null;\n",
           "tests/sql/test_end_of_segment.py::test_publishing_continues_beyond_the_last_segment[pg18-None]"),
    Mutant("I42", "sql/internal/publish.sql", "(new_seq % 1000 = 0 or new_seq % 1000000 >= 999000)", "false",
           "tests/sql/test_end_of_segment.py::test_the_one_who_makes_it_stays_in_its_transaction[pg18-commit]"),
    Mutant("I60", "cdcbridge/database/sqlstates.py", '    "25006": ("away"', '    "25006": ("wrong"',
           "tests/integration/test_read_only.py::test_a_bridge_waits_for_a_store_that_takes_no_writes[pg15]"),
    Mutant("I61", "cdcbridge/database/pooled.py", "                super().execute(self.settings)\n", "                pass\n",
           "tests/integration/test_pgbouncer.py::test_commands_that_call_functions_work_through_it"),
    Mutant("I61", "cdcbridge/database/session.py", '    return _statement(settings, sql.SQL("true"), local=True)',
           '    return _statement(settings, sql.SQL("true"), local=False)',
           "tests/integration/test_pgbouncer.py::test_commands_that_call_functions_work_through_it"),
    Mutant("I62", "cdcbridge/cli/__init__.py", "        sys.stdout = _Closed()\n", "",
           "tests/acceptance/test_cli_text.py::test_a_closed_or_full_stdout_acks_nothing"),
    Mutant("I50", "sql/internal/give_back.sql", "d.deliver_count - 1, case", "d.deliver_count, case",
           f"{LEAVING}every_way_of_leaving_a_loop[pg15-by_return]"),
    Mutant("I50", "cdcbridge/client/_sync.py", "            self._give_back(waiting)\n", "            pass\n",
           f"{LEAVING}next_of_messages_takes_one[pg15]"),
    Mutant("I50", "cdcbridge/client/_sessions_async.py", "                await self._leave()\n", "                pass\n",
           f"{LEAVING}every_way_of_leaving_an_asynchronous_loop[pg15-True-async_kept]"),
    Mutant("I50", "cdcbridge/client/_tasks.py", "            if loop is self._loop:\n", "            if False:\n",
           f"{LEAVING}every_way_of_leaving_an_asynchronous_loop[pg15-False-async_return]"),
    Mutant("I50", "cdcbridge/client/_sessions_async.py", "            if rescue is not None and result", "            if False and result",
           f"{LEAVING}a_claim_that_had_ended_when_it_was_cancelled_goes_back[pg15]"),
    Mutant("I50", "cdcbridge/client/_worker.py", "                if queue.stopped or self._ending:\n", "                if False:\n",
           f"{LEAVING}a_polite_stop_counts_nothing[pg15-sync]"),
    Mutant("I51", "cdcbridge/client/_settling.py", 'if not others or (message.settled == "acked" and message._xid is None and not message.lost):',
           "if True:", f"{ORDER}an_ack_that_was_rolled_back_lets_nothing_out[pg15]"),
    Mutant("I51", "cdcbridge/client/_settling.py", "message.lost = message.lost or done < len(chosen)", "pass",
           f"{ORDER}an_ack_that_came_too_late_lets_nothing_out[pg15-sync]"),
    Mutant("I51", "cdcbridge/client/_common.py", '" then {schema}.extend(', '" then 0 * {schema}.extend(',
           f"{ORDER}a_savepoint_that_was_rolled_back_is_no_ack[pg15]"),
    Mutant("I52", "cdcbridge/client/_settling_async.py", "        if not message._idle and message._half_over:\n", "        if False:\n",
           f"{ORDER}a_message_that_expired_before_its_turn_is_passed_over[pg15-async]"),
    Mutant("I52", "cdcbridge/client/_leases.py", "            if due:\n", "            if False:\n",
           f"{ORDER}the_lease_of_a_stream_is_kept_while_a_slow_handler_runs[pg15-messages-False]"),
    Mutant("I53", "cdcbridge/client/_sessions.py", "                if not session.closed:\n", "                if True:\n",
           f"{LOSS}publish_never_publishes_twice[pg15]"),
    Mutant("I53", "cdcbridge/client/_sessions.py", "if self.closed or left <= 0 or", "if True or",
           f"{LOSS}a_worker_handles_once_although_the_database_was_away[pg15]"),
    Mutant("I53", "cdcbridge/client/_sessions.py", "self._writer.gone:", "self._writer.closed:",
           f"{LOSS}an_idle_session_that_was_ended_costs_nobody_an_error[pg15-sync]"),
    Mutant("I53", "cdcbridge/client/_session_async.py", "limited(gen, self.limit)", "gen",
           f"{LOSS}an_asynchronous_client_behind_a_silent_proxy[pg15]"),
    Mutant("I54", "cdcbridge/client/_worker.py", "        except BaseException as error:\n", "        except Exception as error:\n",
           f"{ENDING}a_handler_ends_and_the_worker_goes_on[pg15-CancelledError-sync]"),
    Mutant("I54", "cdcbridge/client/_handlers.py", '.replace("\\0", "\\\\x00")', "",
           f"{ENDING}a_handler_ends_and_the_worker_goes_on[pg15-raises with NUL-sync]"),
    Mutant("I43", "sql/internal/log_places.sql", "s.seq > $2 and (s.publisher < $3) is not true", "false",
           "tests/sql/test_times.py::test_what_was_published_before_and_committed_after_is_there[pg15]"),
    Mutant("I44", "sql/internal/claim.sql", "    own_claim bigint;\n    look", "    own_claim bigint := draw_claim_id();\n    look",
           f"{SHARDS}a_receive_that_finds_nothing_costs_no_transaction_id[pg15-empty-queue]"),
    Mutant("I70", "cdcbridge/bridge/accepting.py", "    if begun and any(", "    if False and any(",
           f"{APPLY}a_running_bridge_goes_on_without_consumers_that_cannot_work[pg18-pgoutput]"),
    Mutant("I71", "cdcbridge/cli/consumers.py", "        refuse(found)\n", "        del found\n",
           f"{APPLY}apply_refuses_what_check_refuses_in_the_same_words[pg18-pgoutput]"),
    Mutant("I72", "cdcbridge/store/feeds.py", '"fed" if name in known else "not_in_file"', '"fed"',
           f"{APPLY}a_consumer_of_another_file_is_marked_everywhere[pg15-wal2json]"),
    Mutant("I72", "cdcbridge/store/unfed.py", "consumer.name in fed and first < end", "False",
           "tests/integration/test_unfed.py::test_a_consumer_that_is_fed_again_is_told_from_where_to_where[pg18-pgoutput]"),
    Mutant("I73", "cdcbridge/routing/verdict.py", 'return "left"  # it cannot be told', 'return "passed"',
           f"{VERDICT}[record.amount > 5-update-record13-old13-unchanged13-left]"),
    Mutant("I73", "cdcbridge/routing/verdict.py", '("insert", "update", "read") if wanted.reads_op else ("update",)',
           '("update",)', f"{VERDICT}[op == 'insert'-update-record14-old14-unchanged14-left]"),
    Mutant("I74", "cdcbridge/routing/patterns.py", "            if matches(pattern[1:], topic):\n                return False\n",
           "            found = found and not matches(pattern[1:], topic)\n",
           "tests/unit/test_patterns.py::test_take[patterns3-public.orders public.tmp_a]"),
    Mutant("I75", "sql/internal/rights.sql",
           "case when role is null then has_table_privilege(c.name, 'consumers', 'update')",
           "case when role is null then true",
           "tests/sql/test_rights.py::test_a_consumer_without_a_role_is_the_owners_alone[pg18-receive('c')]"),
    Mutant("I76", "sql/internal/holders.sql", "where in_use(to_regclass('waiting_' || $1), $2) and w.consumer_id",
           "where false and w.consumer_id",
           "tests/sql/test_holders.py"
           "::test_what_a_receiver_holds_in_its_transaction_is_counted_with_its_pid[pg15-queue]"),
    Mutant("I77", "cdcbridge/cli/uninstall.py", "        if foreign:\n", "        if False:\n",
           f"{UNINSTALL}what_others_made_stays[pg18-pgoutput]"),
    Mutant("I77", "cdcbridge/cli/uninstall.py", "if row and row[4] and not", "if False and not",
           f"{UNINSTALL}a_publication_that_cannot_be_dropped_now_keeps_its_identities[pg18-pgoutput]"),
    Mutant("I78", "cdcbridge/client/_common.py", "    message.parse_float = parse_float\n", "",
           "tests/integration/test_numbers.py::test_every_digit_arrives_with_parse_float[pg15-sync-s]"),
    Mutant("I81", "cdcbridge/sinks/lane.py", "                await self._finish(target, batch)\n",
           "                await self._move(batch.upto, now=True)\n                await self._finish(target, batch)\n",
           "tests/sinks/test_conformance.py::test_nothing_is_lost_when_the_process_dies[http-stream-delivering]"),
    Mutant("I82", "cdcbridge/sinks/claims.py",
           "                failures = await self._attempt([one.outgoing for one in claim])\n",
           "                await self._call('ack', [one.receipt for one in claim])\n"
           "                failures = await self._attempt([one.outgoing for one in claim])\n",
           "tests/sinks/test_conformance.py::test_nothing_is_lost_when_the_process_dies[file-fifo-delivering]"),
    Mutant("I83", "cdcbridge/sinks/lane.py", "await target.position() if target.remembers else None", "None",
           "tests/sinks/test_engine.py::test_a_target_that_lost_its_tail_gets_it_again"),
    Mutant("I84", "sql/internal/sinks.sql", "and (f.member is null or f.leased_until <= moment)", "and f.lane >= 0",
           "tests/sinks/test_conformance.py::test_another_process_takes_over_within_five_seconds[http]"),
    Mutant("I85", "cdcbridge/sinks/message.py", 'return f"{self.system}-{self.slot}"', "return self.system",
           "tests/unit/test_lane_names.py::test_two_stores_of_one_server_have_lanes_of_their_own"),
    Mutant("I86", "cdcbridge/sinks/lane.py", "            if not failure.for_good:\n",
           "            if failure.for_good:\n                continue\n            if not failure.for_good:\n",
           "tests/sinks/test_engine.py::test_a_refused_message_that_blocks_holds_its_partition"),
    Mutant("I87", "cdcbridge/sinks/claims.py", "return monotonic() < self._valid_until", "return True",
           "tests/sinks/test_engine.py::test_a_process_that_was_stopped_delivers_no_claim_of_another[fifo]"),
    Mutant("I88", "cdcbridge/web/access.py", "if consumer is not None and not self.sees(consumer):", "if False:",
           "tests/web/test_access.py::test_each_role_may_do_what_it_says_and_nothing_else"),
    Mutant("I89", "cdcbridge/web/calls.py", "if left or row[document] is None]", "if row[document] is None]",
           "tests/web/test_rest.py::test_a_caller_that_disconnects_during_the_claim_gives_its_messages_back"),
    Mutant("I89", "cdcbridge/web/events.py", "                await self._source.give_back(unsent)\n",
           "                pass\n", "tests/web/test_events.py"
           "::test_a_slow_reader_holds_one_batch_and_gives_back_the_unsent_ones"),
    Mutant("I90", "cdcbridge/web/queues.py", "list(call.body.receipts), call.body.strict)",
           "list(call.body.receipts), False)", "tests/web/test_rest.py::test_publish_receive_and_ack"),
    Mutant("I91", "cdcbridge/web/arrivals.py", "        if not self.together:\n            self.wake()\n",
           "        return\n", "tests/web/test_arrivals.py::test_a_poll_that_fails_wakes_the_next_one"),
    Mutant("I92", "sql/api/follow_stream.sql", "then 9223372036854775807 else safe end", "then 0 else 9223372036854775807 end",
           "tests/sql/test_follow.py::test_a_message_that_commits_late_is_not_missed[pg18]"),
    Mutant("I93", "cdcbridge/web/calls.py", "if left or row[document] is None]", "if left]",
           "tests/web/test_bounds.py::test_a_large_answer_has_fewer_messages_and_the_others_are_free"),
    Mutant("I94", "cdcbridge/alerts/judging.py",
           "            queue.write(store, result.open, write(result.notices, self._alerts.to, self._source, turn.now))\n"
           '        reach("alert queued")\n',
           '            queue.write(store, result.open, ())\n        reach("alert queued")\n'
           "        queue.write(store, result.open, write(result.notices, self._alerts.to, self._source, turn.now))\n",
           f"{ALERTS}test_a_killed_bridge_loses_no_notification"),
    Mutant("I95", "cdcbridge/alerts/store.py", "           case when %(error)s::text is null then clock_timestamp() end\n",
           "           clock_timestamp()\n", f"{ALERTS}test_a_destination_that_was_away_gets_everything_once_and_in_order"),
    Mutant("I96", "cdcbridge/alerts/store.py", "return store.execute(_LOCK, (url_id,)).fetchone() == (True,)",
           "return url_id != ''", "tests/alerts/test_courier.py::test_one_bridge_at_a_time_delivers_to_a_url"),
    Mutant("I97", "cdcbridge/alerts/tracking.py", "if one.key.rule in judgement.unknown:", "if False:",
           "tests/alerts/test_tracking.py::test_a_warning_has_to_last_for_two_judgements"),
    Mutant("I97", "cdcbridge/alerts/rules.py", "if lag is None or lag.source_error is not None:", "if lag is None:",
           "tests/alerts/test_rules.py::test_what_could_not_be_looked_at_is_unknown"),
    Mutant("I98", "cdcbridge/cli/bridge.py", "            alerting.bridge_ended(error)\n", "            pass\n",
           f"{ALERTS}test_a_bridge_that_ends_for_good_says_so"),
    Mutant("I99", "cdcbridge/alerts/delivery.py", "        for secret in self._secrets:\n", "        for secret in ():\n",
           "tests/alerts/test_delivery.py::test_nothing_of_a_url_is_shown"),
    Mutant("I100", "cdcbridge/alerts/courier.py", "if not queue.lock_url(store, self._url.id):",
           "if not queue.lock_url(store, 'all'):", f"{ALERTS}test_a_destination_that_hangs_holds_up_nobody"),
    Mutant("I101", "cdcbridge/alerts/tracking.py", "silences.get(condition.key.rule, now) > now", "False",
           f"{ALERTS}test_a_silence_stops_notifications_until_it_ends"),
    Mutant("I102", "cdcbridge/web/audit.py", "    number = await store.value(_BEGIN, values)\n", "    number = len(values)\n",
           f"{PAGES}test_nothing_changes_without_its_row_in_the_audit_log"),
    Mutant("I103", "cdcbridge/web/pages/site.py", 'if not same(expected, form.pop("proof", "")):',
           'if form.pop("proof", "") is None:', f"{PAGES}test_a_form_of_another_site_changes_nothing"),
    Mutant("I104", "cdcbridge/web/pages/dead.py", "*self._chosen.values(), place, until)", "*self._chosen.values(), after, until)",
           f"{PAGES}test_a_large_retry_goes_step_by_step_and_ends"),
    Mutant("I105", "cdcbridge/web/calls.py", 'return masked(data, mask) if data.lstrip().startswith("{") else "null"',
           "return data", f"{PAGES}test_data_is_hidden_by_mask_and_by_role[True-ops screen]"),
    Mutant("I106", "cdcbridge/web/pages/login.py", "hashlib.sha256(token.token.get_secret_value().encode()).digest()",
           "hashlib.sha256(token.name.encode()).digest()",
           f"{PAGES}test_a_cookie_that_was_changed_or_is_old_is_no_session"),
    Mutant("I107", "cdcbridge/web/sqs/signature.py",
           'if not hmac.compare_digest(expected.encode(), signature.value.encode(errors="replace")):', "if False:",
           "tests/web/sqs/test_signature.py::test_a_change_is_noticed"),
    Mutant("I108", "cdcbridge/web/sqs/receiving.py",
           'if owner != f"{statements_of(queue).kind}:{queue.consumer}" or not', "if not",
           "tests/web/sqs/test_messages.py::test_a_receipt_handle_that_is_none"),
    Mutant("I109", "cdcbridge/web/sqs/receiving.py",
           "    return sorted(found, key=lambda one: first[one.key])\n", "    return found[::-1]\n",
           "tests/web/sqs/test_fifo.py::test_messages_of_a_group_are_in_order"),
    Mutant("I110", "cdcbridge/web/sqs/managing.py", "        if left:\n            raise SqsError(\n                BUSY,",
           "        if False:\n            raise SqsError(\n                BUSY,",
           "tests/web/sqs/test_queues.py::test_a_move_of_very_many_letters_ends_in_time"),
    Mutant("I111", "cdcbridge/web/pages/site.py", "return None if ended else caller", "return caller",
           f"{PAGES}test_no_process_accepts_the_cookie_of_a_session_that_ended"),
    Mutant("I112", "cdcbridge/web/connection.py", "if self._head > _MOST_HEADERS:", "if False:",
           "tests/web/test_connection.py::test_incomplete_headers_are_bounded"),
    Mutant("I113", "cdcbridge/mirrors/target.py", "               %s::pg_lsn\n        returning id)",
           "               %s::pg_lsn where false\n        returning id)",
           "tests/mirrors/test_kill.py::test_each_change_once[mirror committed]"),
    Mutant("I114", "cdcbridge/routing/collector.py", "            self._mark(Marker.read(event.content))\n",
           "            pass\n", "tests/mirrors/test_one_way.py::test_two_way"),
    Mutant("I115", "cdcbridge/mirrors/careful.py", "if missing and self._lock(table, missing):", "if missing is None:",
           "tests/mirrors/test_between.py::test_a_row_that_appears_is_not_overwritten[update against delete]"),
    Mutant("I116", "cdcbridge/mirrors/rule.py", "if own is None or own.lsn <= incoming.seen:", "if own is None:",
           f"{MIRROR_RULE}[newest]"),
    Mutant("I117", "cdcbridge/mirrors/rule.py", "(write.effective_time, write.side) > (rival.effective_time, rival.side)",
           "write.effective_time > rival.effective_time", f"{MIRROR_RULE}[newest]"),
    Mutant("I117", "cdcbridge/routing/collector.py", "max(self._effective_time, event.commit_time)", "event.commit_time",
           MIRROR_CLOCK),
    Mutant("I118", "cdcbridge/mirrors/careful.py", "            if decision.kind is not None and self._reports(decision):\n",
           "            if decision.kind is not None and decision.apply:\n", MIRROR_CLOCK),
    Mutant("I119", "cdcbridge/mirrors/applier.py", "            if self._target.open and piece.whole:\n",
           "            if self._target.open:\n",
           "tests/mirrors/test_kill.py::test_a_large_transaction_is_whole_or_missing"),
    Mutant("I120", "cdcbridge/mirrors/target.py", "        if row is None or not row[0]:\n", "        if row is None:\n",
           "tests/mirrors/test_kill.py::test_a_second_process_waits_for_the_first"),
    Mutant("I121", "cdcbridge/revert/undo.py", "force=force, locked=True)", "force=force, locked=False)",
           f"{REVERTS}refused.py::test_a_writer_between_the_plan_and_its_application"
           "[open-update t set a = 7 where id = 1-a changed since]"),
    Mutant("I121", "cdcbridge/revert/plan.py", "if name in now and not same(after[name], now[name])]\n        conflict = _conflict(change, now, others)",
           "if False]\n        conflict = _conflict(change, now, others)",
           f"{REVERTS}refused.py::test_a_writer_between_the_plan_and_its_application"
           "[committed-update t set a = 7 where id = 1-a changed since]"),
    Mutant("I122", "cdcbridge/revert/history.py", "self._rows.clear()  # ", "pass  # ",
           f"{REVERTS}refused.py::test_a_gap_or_a_filter_makes_earlier_messages_worthless"),
    Mutant("I122", "cdcbridge/revert/selection.py", "s.filter is None and s.operations == frozenset(OPERATIONS)]", "True]",
           f"{REVERTS}refused.py::test_a_gap_or_a_filter_makes_earlier_messages_worthless"),
    Mutant("I123", "cdcbridge/revert/undo.py", "ordered(plan.steps, revert.references, revert.tables)", "list(plan.steps)",
           f"{REVERTS}revert.py::test_a_transaction_is_undone_in_reverse_order[pg18-pgoutput]"),
    Mutant("I124", "cdcbridge/routing/collector.py", "                self._annotate(event)\n",
           "                self._ordinal > self._skip_through and self._annotate(event)\n",
           f"{REVERTS}annotations.py::test_a_restart_inside_the_transaction_keeps_the_annotation"),
    Mutant("I125", "cdcbridge/sql/internal/retention.sql", "then mirror_behind(beyond) end", "then null end",
           "tests/sql/test_mirror_retention.py::test_the_log_keeps_what_a_mirror_has_not_applied"),
)  # fmt: skip


def survives(mutant: Mutant, folder: Path) -> str | None:
    """None if the test turned red; else what is wrong."""
    path = folder / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"applies {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout", "100", mutant.test]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    finally:
        path.write_text(text)
    return None if result.returncode == 1 else f"pytest exited with {result.returncode}: {result.stdout[-300:]}"


def main(wanted: Sequence[str]) -> int:
    """Each mutant in turn, in a copy; of the wanted invariants, or all."""
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="cdcbridge-mutants-") as temporary:
        folder = Path(temporary) / "tree"
        shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".venv", ".git", ".*_cache", "out"))
        for mutant in (m for m in MUTANTS if not wanted or m.invariant in wanted):
            problem = survives(mutant, folder)
            wrong += problem is not None
            print(
                f"{mutant.invariant:<4} {'red, as it should be' if problem is None else problem}: {mutant.test}",
                flush=True,
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
