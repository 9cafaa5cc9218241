// The tests; each stops the program where something is wrong.
#pragma once

void test_team();
void test_mapping();
void test_linear();
void test_parts();
void test_decoder();
