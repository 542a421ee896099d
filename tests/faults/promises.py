"""Which test holds what is promised about each fault: the table of docs/reliability.md."""

from __future__ import annotations

_KILLS = "faults/test_kills.py::test_a_run_that_is_killed_again_and_again_is_the_unbroken_one"
_BACKGROUND = "faults/test_kills.py::test_a_save_in_the_background_may_be_killed_at_any_moment"
_ALTERED = "faults/test_altered.py::test_an_altered_checkpoint_is_refused_by_name"
_RESUMED = "distributed/test_resume.py::test_resume_is_bit_exact_around_a_merge_and_the_transition"
_MALFORMED = "unit/config/test_malformed_run.py::test_one_problem_with_place_key_value_and_rule"
_BUILD = "unit/data/test_builtin.py::test_a_build_that_is_killed_leaves_nothing_wrong"
_WANDB = "unit/train/telemetry/test_wandb_sink.py::"
_REQUESTS = "unit/train/lifetime/test_requests.py::"
_ENDS = "distributed/test_ends.py::"
_STORE = "unit/checkpoint/saving/test_saving_store.py::"

PROMISES: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "SIGKILL of one rank",
        (_KILLS, _ENDS + "test_a_killed_rank_is_named_by_the_others"),
    ),
    2: ("SIGKILL in a save", (_KILLS, _BACKGROUND)),
    3: (
        "SIGTERM to one rank",
        (
            "faults/test_requests.py::test_one_rank_is_asked_to_stop_at_any_moment",
            "faults/test_requests.py::test_a_save_in_the_background_and_an_export_are_asked_to_stop",
        ),
    ),
    4: (
        "a launcher is stopped or killed",
        (
            "distributed/test_single_node.py::"
            "test_sigterm_and_a_killed_launcher_save_and_leave_no_rank",
            _REQUESTS + "test_a_launcher_that_is_killed",
            _REQUESTS + "test_a_rank_that_was_abandoned_before_it_could_look",
        ),
    ),
    5: ("two signals", (_REQUESTS + "test_a_late_second_request_ends_a_save_at_once",)),
    6: (
        "disk full in a save",
        (
            _STORE + "test_a_disk_that_is_full_at_any_moment",
            "distributed/test_saving.py::"
            "test_a_full_disk_ends_the_run_and_the_last_checkpoint_goes_on",
        ),
    ),
    7: (
        "read-only file system",
        (
            "unit/checkpoint/saving/test_room.py::test_a_directory_that_cannot_be_written",
            _STORE + "test_a_disk_that_turns_read_only_at_any_moment",
        ),
    ),
    8: ("shard cut short", (_ALTERED,)),
    9: ("flipped bit", (_ALTERED,)),
    10: ("file of a rank missing, or one too many", (_ALTERED,)),
    11: (
        "latest missing, empty, wrong, elsewhere",
        (_ALTERED, "unit/checkpoint/test_find.py::test_what_latest_says_is_read_without_trust"),
    ),
    12: (
        "two jobs in one directory",
        (
            "faults/test_starts.py::test_the_same_command_twice",
            "faults/test_requests.py::"
            "test_the_second_of_two_starts_is_refused_and_the_first_goes_on",
            "unit/train/lifetime/test_lock.py::test_a_killed_holder_does_not_stand_in_the_way",
            "unit/train/lifetime/test_lock.py::"
            "test_a_dead_holder_on_another_machine_is_waited_for_and_replaced",
        ),
    ),
    13: (
        "plain resume",
        (
            _RESUMED,
            "distributed/test_stage3_run.py::test_stage_3_resumes_bit_exactly_and_exports",
            "faults/test_soak.py::test_random_kills_change_nothing",
        ),
    ),
    14: ("killed within gradient accumulation", (_KILLS,)),
    15: (
        "resume around a merge, a switch, the transition",
        (
            _RESUMED,
            _KILLS,
            "distributed/test_switchlora_run.py::"
            "test_a_resumed_run_is_bit_identical_with_frozen_vectors_pending",
        ),
    ),
    16: ("killed within a merge", (_KILLS,)),
    17: (
        "other data-parallel size",
        ("distributed/test_reshape.py::test_nothing_is_lost_on_the_way",),
    ),
    18: (
        "other tensor-parallel size",
        (
            "distributed/test_tensor_run.py::"
            "test_a_shared_model_is_continued_by_one_process_and_back",
        ),
    ),
    19: (
        "other ZeRO stage",
        ("distributed/test_reshape.py::test_the_run_goes_on_with_the_same_losses",),
    ),
    20: (
        "run differs from the checkpoint",
        (
            "unit/checkpoint/test_resume.py::test_every_difference_is_listed",
            "unit/checkpoint/test_resume.py::test_another_method_and_another_model",
        ),
    ),
    21: (
        "a loss that is no number",
        (
            "faults/test_requests.py::"
            "test_a_loss_that_is_no_number_on_one_rank_ends_all_and_the_last_checkpoint_stays",
            "distributed/test_guarded_run.py::test_a_destroyed_model_is_neither_saved_nor_exported",
        ),
    ),
    22: (
        "a gradient that is no number",
        (
            "distributed/test_guards.py::test_a_skipped_step_leaves_no_trace",
            "unit/train/guards/test_steps.py::test_one_event_too_many_ends_the_run",
        ),
    ),
    23: (
        "loss spike",
        (
            "unit/train/guards/test_spikes.py::"
            "test_only_what_is_beyond_sigma_deviations_of_the_mean_is_a_spike",
            "distributed/test_guarded_run.py::"
            "test_a_rollback_ends_as_the_run_that_never_saw_the_batch",
        ),
    ),
    24: (
        "a merge that changes the function",
        ("unit/train/guards/test_weights.py::test_more_than_rounding_can_explain",),
    ),
    25: (
        "replicas that differ",
        (
            "distributed/test_stage3.py::test_one_changed_bit_is_found_by_name",
            "distributed/test_switchlora_run.py::"
            "test_a_lost_bit_ends_the_run_at_the_next_logged_switch",
        ),
    ),
    26: (
        "stuck collective",
        (
            _ENDS + "test_a_stopped_rank_is_given_up_and_not_left_behind",
            _ENDS + "test_a_rank_that_waits_for_ever_is_named",
        ),
    ),
    27: (
        "ranks at different places",
        ("distributed/test_guards.py::test_ranks_at_different_places_say_where_each_is",),
    ),
    28: (
        "host or link lost",
        (
            "multihost/test_launch.py::test_another_host_takes_over_from_a_crashed_one",
            "multihost/test_launch.py::test_a_cut_link_exits_7_within_the_timeout",
        ),
    ),
    29: (
        "bad hostfile",
        (
            "unit/test_launch_scripts.py::test_mistakes_exit_2_before_anything_is_started",
            "unit/test_launch_scripts.py::test_a_missing_hostfile_is_an_error_and_no_local_run",
        ),
    ),
    30: (
        "port in use",
        ("faults/test_requests.py::test_a_port_that_is_taken_is_named_in_one_line",),
    ),
    31: (
        "malformed run file",
        (_MALFORMED, "unit/config/test_malformed_run.py::test_files_that_are_no_run_file"),
    ),
    32: (
        "token ids beyond the vocabulary, other tokenizer",
        (
            "unit/data/test_verify.py::test_an_id_in_the_middle_is_found_whatever_the_record_says",
            "unit/data/test_source.py::test_tokenizers_must_agree",
        ),
    ),
    33: (
        "bad data",
        (
            "unit/data/test_corpus.py::test_bad_input_is_located_or_skipped",
            "unit/data/test_corpus.py::test_memory_does_not_grow_with_a_document",
            "unit/data/test_verify.py::test_every_alteration_is_refused_or_changes_nothing",
        ),
    ),
    34: (
        "more steps than data",
        ("unit/data/test_sampler.py::test_every_epoch_is_a_fresh_permutation",),
    ),
    35: (
        "preparation killed, or started twice",
        (
            _BUILD,
            "faults/test_tools.py::test_preparing_data_may_be_killed_at_any_moment",
            "unit/data/test_prepare.py::test_interrupted_publication_leaves_nothing_that_opens",
            "unit/data/test_builtin.py::test_lock_held_too_long",
        ),
    ),
    36: (
        "clock that jumps",
        ("unit/train/telemetry/test_meter.py::test_a_wall_clock_that_jumps_changes_nothing",),
    ),
    37: (
        "wandb offline, without login, hanging",
        (
            _WANDB + "test_online_falls_back_to_offline_within_seconds",
            _WANDB + "test_a_server_that_hangs_holds_nothing_up",
            _WANDB + "test_a_missing_login_asks_nobody",
        ),
    ),
    38: (
        "credentials",
        (
            "faults/test_requests.py::test_credentials_are_nowhere_in_what_a_run_leaves",
            "unit/train/telemetry/test_logs.py::"
            "test_credentials_are_masked_in_messages_and_tracebacks",
        ),
    ),
    39: (
        "killed by the system for its memory",
        (_ENDS + "test_a_killed_rank_is_named_by_the_others",),
    ),
}
"""What happens, and which tests hold what is promised about it, by number."""
