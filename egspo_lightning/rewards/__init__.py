"""From text to reward, without torch: answer extraction, grading, and the killable workers that grade."""
