"""Which tests hold what was found wrong from outside, by kind: the second table of the page.

Each kind was seen as one instance. The tests try others of it, and the instance where it is cheap.
"""

from __future__ import annotations

_BUILTIN = "unit/data/test_builtin.py::"
_ENDS = "distributed/test_ends.py::"
_GUARDED = "distributed/test_guarded_run.py::"
_HF = "unit/model/hf/test_directory.py::"
_HOSTILE = "unit/config/test_hostile_input.py::"
_KILLS = "faults/test_kills.py::"
_METRICS = "unit/train/telemetry/test_metrics_file.py::"
_RECOVERY = "unit/checkpoint/saving/test_recovery.py::"
_REQUESTS = "unit/train/lifetime/test_requests.py::"
_STARTS = "faults/test_starts.py::"
_STOPS = "faults/test_requests.py::"
_STORE = "unit/checkpoint/saving/test_saving_store.py::"
_VERIFY = "unit/data/test_verify.py::"
_WHOLE = "unit/checkpoint/test_whole_checkpoint.py::"

TRIALS: dict[str, tuple[str, tuple[str, ...]]] = {
    "F1": (
        "code in what is loaded",
        (
            "distributed/test_safe_load.py::test_no_load_runs_code",
            "unit/checkpoint/test_alterations.py::test_damage_is_refused_or_changes_nothing",
        ),
    ),
    "F2": (
        "a destroyed model, saved or exported",
        (
            _GUARDED + "test_a_destroyed_model_is_neither_saved_nor_exported",
            _GUARDED + "test_weights_too_large_to_compute_with_are_not_saved",
            "unit/checkpoint/test_finite.py::test_a_checkpoint_is_not_rewritten",
            "unit/checkpoint/test_finite.py::test_a_checkpoint_is_not_exported",
        ),
    ),
    "F3": (
        "ranks that outlive their launcher",
        (
            "distributed/test_killed_launchers.py::test_no_process_outlives_its_launcher",
            _REQUESTS + "test_a_launcher_that_is_killed",
            _REQUESTS + "test_a_rank_that_was_abandoned_before_it_could_look",
            "unit/launch/test_supervise.py::test_every_signal_is_for_processes_of_this_launch",
        ),
    ),
    "F4": (
        "data that changed or is foreign",
        (
            _VERIFY + "test_every_alteration_is_refused_or_changes_nothing",
            _VERIFY + "test_an_id_in_the_middle_is_found_whatever_the_record_says",
            "unit/data/test_tokens.py::test_a_foreign_description_is_refused",
        ),
    ),
    "F5": (
        "files that the manifest does not list, or lists wrongly",
        (
            _WHOLE + "test_files_that_are_not_those_of_the_run",
            _WHOLE + "test_files_of_another_step_or_name_or_run",
            _WHOLE + "test_a_step_that_the_run_does_not_have",
            _WHOLE + "test_damaged_manifests",
        ),
    ),
    "F6": (
        "two runs in one directory, or a lost latest",
        (
            _STARTS + "test_the_same_command_twice",
            _STOPS + "test_the_second_of_two_starts_is_refused_and_the_first_goes_on",
            _STARTS + "test_a_lock_that_a_dead_host_has_left",
            "unit/checkpoint/test_resume.py::test_a_lost_latest_never_starts_over",
            "faults/test_altered.py::test_an_altered_checkpoint_is_refused_by_name",
        ),
    ),
    "F7": (
        "a step that is saved again",
        (
            "faults/test_again.py::test_a_step_may_be_saved_again_and_killed_at_any_moment",
            _STORE + "test_the_same_step_again_takes_the_place",
            _RECOVERY + "test_killed_while_a_step_took_its_own_place",
        ),
    ),
    "F8": (
        "a finished run that is started again",
        (_GUARDED + "test_a_finished_run_that_is_started_again_is_left_alone",),
    ),
    "F9": (
        "lines of metrics that are doubled or missing",
        (
            _KILLS + "test_a_run_that_is_killed_again_and_again_is_the_unbroken_one",
            _METRICS + "test_what_followed_the_report_of_the_resumed_step_happens_again",
        ),
    ),
    "F10": (
        "good checkpoints that are removed",
        (
            _STORE + "test_strays_neither_count_nor_go",
            _RECOVERY + "test_going_on_from_an_older_one",
            "unit/checkpoint/test_find.py::test_what_has_the_name_of_a_checkpoint_without_being_one",
        ),
    ),
    "F11": (
        "control files that hold something else",
        (
            "unit/checkpoint/test_find.py::test_what_latest_says_is_read_without_trust",
            "unit/checkpoint/test_record.py::test_damaged_manifests",
            "unit/checkpoint/test_record.py::test_damaged_files",
            "unit/checkpoint/test_saved_run.py::test_damaged_side_file",
            _STORE + "test_what_is_no_checkpoint_makes_room_and_stays",
        ),
    ),
    "F12": (
        "signals at any time, before libraries are there too",
        (
            _REQUESTS + "test_before_training_there_is_nothing_to_save",
            _REQUESTS + "test_in_training_a_request_is_remembered",
            _STOPS + "test_one_rank_is_asked_to_stop_at_any_moment",
            _STOPS + "test_a_save_in_the_background_and_an_export_are_asked_to_stop",
        ),
    ),
    "F13": (
        "a failure while results are written",
        (
            "faults/test_again.py::test_results_that_cannot_be_written_hide_nothing",
            "faults/test_again.py::"
            "test_an_export_that_found_no_room_is_written_by_the_same_command",
            _GUARDED + "test_a_foreign_export_directory_is_refused_before_training",
        ),
    ),
    "F14": (
        "disk full, read-only, not to be written",
        (
            _STORE + "test_a_disk_that_is_full_at_any_moment",
            _STORE + "test_a_disk_that_turns_read_only_at_any_moment",
            "distributed/test_saving.py::"
            "test_a_full_disk_ends_the_run_and_the_last_checkpoint_goes_on",
            "unit/checkpoint/saving/test_room.py::test_a_directory_that_cannot_be_written",
        ),
    ),
    "F15": (
        "work of one rank that takes longer than a collective may",
        (_STARTS + "test_work_of_one_rank_may_take_longer_than_a_collective",),
    ),
    "F16": (
        "leftovers of what was killed",
        (
            _KILLS + "test_a_run_that_is_killed_again_and_again_is_the_unbroken_one",
            "faults/test_tools.py::test_preparing_data_may_be_killed_at_any_moment",
            "faults/test_tools.py::test_an_export_may_be_killed_at_any_moment",
            _BUILTIN + "test_a_build_that_is_killed_leaves_nothing_wrong",
            _RECOVERY + "test_unfinished_and_half_removed_ones_go",
            _METRICS + "test_what_a_killed_writer_left_goes_and_what_another_one_writes_stays",
        ),
    ),
    "F17": (
        "absurd names, numbers, pipes and secrets in a run file",
        (
            _HOSTILE + "test_absurd_numbers",
            _HOSTILE + "test_names_that_no_file_can_have",
            _HOSTILE + "test_models_that_no_machine_holds",
            _HOSTILE + "test_secrets_are_not_repeated",
            "unit/files/test_regular.py::test_anything_else_is_refused_with_a_reason",
            "unit/data/test_tokens.py::test_pipes_and_devices_are_not_opened",
            _HF + "test_an_index_names_files_beside_it",
            "unit/test_redaction.py::test_credentials_inside_of_urls",
        ),
    ),
    "F18": (
        "exports that colleagues cannot read, or that differ by the byte",
        (
            _HF + "test_equal_models_give_equal_files_that_colleagues_can_read",
            "unit/files/test_tensor_files.py::test_the_mode_is_the_umasks",
            "unit/files/test_tensor_files.py::test_equal_tensors_give_equal_bytes",
        ),
    ),
    "F19": (
        "a damaged cache of the builtin corpus",
        (
            _BUILTIN + "test_a_damaged_cache_is_built_again",
            _BUILTIN + "test_a_cache_of_an_earlier_version_is_built_again",
        ),
    ),
    "F20": (
        "a directory that is removed under a run, and problems without number",
        (
            _STARTS + "test_a_directory_that_is_removed_under_a_run",
            _METRICS
            + "test_a_file_that_was_removed_does_not_take_lines_as_if_nothing_had_happened",
            _HOSTILE + "test_problems_beyond_count_are_counted",
        ),
    ),
}
"""What was found, and which tests hold that it is so no more, by number."""
