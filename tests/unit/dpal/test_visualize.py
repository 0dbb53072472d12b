import numpy as np
import pytest

from dpal import visualize

GRID, SIZE = (8, 4), (128, 64)


def _tokens(images: int = 3, width: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scales = np.array([9, 5, 3] + [0.1] * (width - 3))
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return rng.normal(size=(images, GRID[0] * GRID[1], width)) * scales @ basis


def test_components_have_unit_variance_and_one_basis_for_all_images():
    tokens = _tokens()
    components = visualize.pca_components(tokens)
    flat = components.reshape(-1, 3)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.cov(flat.T, bias=True), np.eye(3), atol=1e-5)
    shuffled = visualize.pca_components(tokens[::-1])
    np.testing.assert_allclose(shuffled[::-1], components, atol=1e-5)


def test_components_do_not_depend_on_the_sign_the_solver_returns():
    tokens = _tokens()
    components = visualize.pca_components(tokens)
    centred = tokens.reshape(-1, 16) - tokens.reshape(-1, 16).mean(0)
    for index in range(3):
        loading = centred.T @ components.reshape(-1, 3)[:, index]
        assert loading[np.abs(loading).argmax()] > 0


def test_components_of_a_narrow_network_are_padded_with_zeros():
    components = visualize.pca_components(_tokens()[..., :2])
    assert components.shape == (3, 32, 3)
    assert (components[..., 2] == 0).all()


def test_alignment_undoes_any_rotation_or_reflection():
    reference = visualize.pca_components(_tokens())
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turn[:, 0] *= -1
    aligned, agreement = visualize.align_components(
        (reference @ turn).astype(np.float32), reference
    )
    np.testing.assert_allclose(aligned, reference, atol=1e-5)
    assert agreement == pytest.approx(1, abs=1e-5)


def test_alignment_cannot_make_unrelated_features_agree():
    reference = visualize.pca_components(_tokens(20))
    other = visualize.pca_components(_tokens(20, seed=5))
    _aligned, agreement = visualize.align_components(other, reference)
    assert agreement < 0.3


def test_student_that_is_a_rotated_teacher_gets_the_teachers_colours():
    teacher = _tokens()
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(16, 16)))[0]
    maps = visualize.feature_maps(teacher, teacher @ turn, grid=GRID, size=SIZE)
    assert maps.teacher.shape == (3, *SIZE, 3)
    assert maps.student is not None
    difference = np.abs(maps.student.astype(int) - maps.teacher.astype(int))
    assert difference.max() <= 2


def test_one_outlier_patch_does_not_wash_out_the_colours():
    tokens = _tokens(8)
    calm = visualize.feature_maps(tokens, None, grid=GRID, size=SIZE).teacher
    tokens[0, 0] *= 3
    shaken = visualize.feature_maps(tokens, None, grid=GRID, size=SIZE).teacher
    assert np.abs(shaken[1:].astype(int) - calm[1:].astype(int)).mean() < 16


def test_similarity_is_one_at_the_point_itself_and_ignores_length():
    tokens = _tokens()[0]
    similar = visualize.similarity_map(tokens, 5)
    assert similar.argmax() == 5
    tokens[7] = 10 * tokens[5]
    assert visualize.similarity_map(tokens, 5)[7] == pytest.approx(1, abs=1e-6)


def test_heat_is_brighter_where_the_weight_is_higher():
    weights = np.zeros(GRID, np.float32)
    weights[:4] = 1
    overlay = visualize.heat_overlay(np.full((*SIZE, 3), 128, np.uint8), weights)
    assert overlay[:48].mean() > overlay[80:].mean() + 40


def test_marked_point_changes_the_picture_only_around_it():
    picture = np.full((*SIZE, 3), 90, np.uint8)
    changed = (visualize.mark_point(picture, 32, 16) != picture).any(-1)
    rows, columns = np.nonzero(changed)
    assert rows.size > 0
    assert abs(rows - 32).max() < 12
    assert abs(columns - 16).max() < 12


def test_mosaic_shows_every_picture_at_one_height():
    pictures = [np.full((40, 20, 3), 10 * n, np.uint8) for n in range(1, 4)]
    sheet = visualize.mosaic([pictures, pictures[:2]], cell_height=80, gap=4)
    assert sheet.shape == (4 + 2 * 84, 4 + 3 * 44, 3)
    for column, picture in enumerate(pictures):
        assert (sheet[44, 4 + 44 * column + 20] == picture[0, 0]).all()
    assert (sheet[84 + 44, 4 + 44 * 2 + 20] == visualize.PLATE).all()


def test_mosaic_makes_room_for_labels():
    picture = [np.zeros((40, 20, 3), np.uint8)]
    bare, labelled = visualize.mosaic([picture]), visualize.mosaic([picture], row_labels=["a row"])
    assert labelled.shape[1] > bare.shape[1] + 20


def test_constant_values_are_stretched_to_the_middle():
    assert (visualize.stretch(np.full(7, 3.0)) == 0.5).all()
