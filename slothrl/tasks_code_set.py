"""Thirty-two small functions to write, with a solution and tests each: enough to try code rewards without any download.

One line a test: the arguments, then the result. `tests/unit/test_ready_tasks.py` runs every solution against them.
"""

from __future__ import annotations

from typing import Any

# (signature, what it does, solution's body, tests)
Problem = tuple[str, str, str, list[tuple[list[Any], Any]]]

PROBLEMS: list[Problem] = [
    ("add(a, b)", "returns the sum of two numbers", "return a + b", [([2, 3], 5), ([-1, 1], 0), ([10, -4], 6)]),
    (
        "is_even(n)",
        "tells whether a whole number is even",
        "return n % 2 == 0",
        [([4], True), ([7], False), ([0], True), ([-3], False)],
    ),
    (
        "maximum(numbers)",
        "returns the largest number of a list, or None for an empty list",
        "return max(numbers) if numbers else None",
        [([[3, 9, 2]], 9), ([[-5, -2]], -2), ([[]], None)],
    ),
    (
        "reverse_text(text)",
        "returns the text from its end to its beginning",
        "return text[::-1]",
        [(["abc"], "cba"), ([""], ""), (["ab ba c"], "c ab ba")],
    ),
    (
        "is_palindrome(text)",
        "tells whether a text reads the same in both directions",
        "return text == text[::-1]",
        [(["level"], True), (["levels"], False), ([""], True), (["Abba"], False)],
    ),
    (
        "count_vowels(text)",
        "counts the vowels a, e, i, o, u, in upper and lower case",
        "return sum(letter in 'aeiou' for letter in text.lower())",
        [(["Education"], 5), (["rhythm"], 0), (["AEIOU aeiou"], 10)],
    ),
    (
        "factorial(n)",
        "returns the product of the whole numbers from 1 to n; 1 for n = 0",
        "result = 1\nfor factor in range(2, n + 1):\n    result *= factor\nreturn result",
        [([0], 1), ([5], 120), ([10], 3628800)],
    ),
    (
        "fibonacci(n)",
        "returns the n-th Fibonacci number, where the numbers 0 and 1 have the indices 0 and 1",
        "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
        [([0], 0), ([1], 1), ([10], 55), ([30], 832040)],
    ),
    (
        "is_prime(n)",
        "tells whether a whole number is prime",
        "return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))",
        [([2], True), ([1], False), ([91], False), ([97], True), ([0], False)],
    ),
    (
        "gcd(a, b)",
        "returns the greatest common divisor of two positive whole numbers",
        "while b:\n    a, b = b, a % b\nreturn a",
        [([12, 18], 6), ([7, 13], 1), ([100, 10], 10)],
    ),
    (
        "digit_sum(n)",
        "returns the sum of the decimal digits of a whole number that is not negative",
        "return sum(int(digit) for digit in str(n))",
        [([0], 0), ([1234], 10), ([999], 27)],
    ),
    (
        "unique(items)",
        "returns the items of a list without repetitions, in the order of their first occurrence",
        "return list(dict.fromkeys(items))",
        [([[1, 2, 1, 3, 2]], [1, 2, 3]), ([["b", "a", "b"]], ["b", "a"]), ([[]], [])],
    ),
    (
        "word_count(text)",
        "returns a dictionary that says how often each word occurs; words are separated by white space",
        "counts = {}\nfor word in text.split():\n    counts[word] = counts.get(word, 0) + 1\nreturn counts",
        [(["a b a"], {"a": 2, "b": 1}), ([""], {}), (["The the"], {"The": 1, "the": 1})],
    ),
    (
        "flatten(lists)",
        "joins a list of lists into one list",
        "return [item for part in lists for item in part]",
        [([[[1, 2], [3]]], [1, 2, 3]), ([[[], []]], []), ([[["a"], ["b", "c"]]], ["a", "b", "c"])],
    ),
    (
        "chunks(items, size)",
        "cuts a list into lists of `size` items; the last one may be shorter",
        "return [items[start : start + size] for start in range(0, len(items), size)]",
        [([[1, 2, 3, 4, 5], 2], [[1, 2], [3, 4], [5]]), ([[], 3], []), ([[1], 4], [[1]])],
    ),
    (
        "rotate(items, steps)",
        "moves every item of a list `steps` places to the right; what falls out comes back on the left",
        "if not items:\n    return []\ncut = len(items) - steps % len(items)\nreturn items[cut:] + items[:cut]",
        [([[1, 2, 3, 4], 1], [4, 1, 2, 3]), ([[1, 2, 3], 5], [2, 3, 1]), ([[], 2], [])],
    ),
    (
        "second_largest(numbers)",
        "returns the second largest of the different numbers in a list, or None where there are not two",
        "different = sorted(set(numbers))\nreturn different[-2] if len(different) > 1 else None",
        [([[1, 5, 3]], 3), ([[7, 7]], None), ([[2, 9, 9]], 2)],
    ),
    (
        "binary(n)",
        "returns the binary digits of a whole number that is not negative, as text without a prefix",
        "return format(n, 'b')",
        [([0], "0"), ([5], "101"), ([255], "11111111")],
    ),
    (
        "roman(n)",
        "writes a whole number from 1 to 3999 in Roman numerals",
        "values = [1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1]\n"
        "signs = 'M CM D CD C XC L XL X IX V IV I'.split()\ntext = ''\n"
        "for value, sign in zip(values, signs):\n    while n >= value:\n        text, n = text + sign, n - value\n"
        "return text",
        [([4], "IV"), ([1994], "MCMXCIV"), ([3999], "MMMCMXCIX")],
    ),
    (
        "caesar(text, shift)",
        "moves every letter a to z by `shift` places in the alphabet, z being followed by a; other characters stay",
        "return ''.join(chr((ord(c) - 97 + shift) % 26 + 97) if 'a' <= c <= 'z' else c for c in text)",
        [(["abc", 1], "bcd"), (["xyz!", 3], "abc!"), (["hello", -1], "gdkkn")],
    ),
    (
        "are_anagrams(first, second)",
        "tells whether two texts consist of the same letters, case aside",
        "return sorted(first.lower()) == sorted(second.lower())",
        [(["listen", "Silent"], True), (["abc", "abd"], False), (["aab", "ab"], False)],
    ),
    (
        "balanced(text)",
        "tells whether the brackets (), [] and {} of a text are properly nested and closed",
        "pairs, waiting = {')': '(', ']': '[', '}': '{'}, []\nfor c in text:\n    if c in '([{':\n"
        "        waiting.append(c)\n    elif c in pairs and (not waiting or waiting.pop() != pairs[c]):\n"
        "        return False\nreturn not waiting",
        [(["([]{})"], True), (["(]"], False), (["(("], False), (["a(b)c"], True), ([")"], False)],
    ),
    (
        "run_length(text)",
        "returns a list of [character, length] pairs for the runs of equal characters",
        "runs = []\nfor c in text:\n    if runs and runs[-1][0] == c:\n        runs[-1][1] += 1\n    else:\n"
        "        runs.append([c, 1])\nreturn runs",
        [(["aaab"], [["a", 3], ["b", 1]]), ([""], []), (["abab"], [["a", 1], ["b", 1], ["a", 1], ["b", 1]])],
    ),
    (
        "merge_sorted(first, second)",
        "merges two sorted lists into one sorted list",
        "return sorted(first + second)",
        [([[1, 4], [2, 3]], [1, 2, 3, 4]), ([[], [5]], [5]), ([[1, 1], [1]], [1, 1, 1])],
    ),
    (
        "two_sum(numbers, target)",
        "returns the indices [i, j], i < j, of the two numbers that add up to target; there is exactly one such pair",
        "for j, number in enumerate(numbers):\n    for i in range(j):\n        if numbers[i] + number == target:\n"
        "            return [i, j]",
        [([[2, 7, 11, 15], 9], [0, 1]), ([[3, 2, 4], 6], [1, 2]), ([[3, 3], 6], [0, 1])],
    ),
    (
        "transpose(rows)",
        "returns the columns of a rectangular list of rows",
        "return [list(column) for column in zip(*rows)]",
        [([[[1, 2], [3, 4]]], [[1, 3], [2, 4]]), ([[[1, 2, 3]]], [[1], [2], [3]]), ([[]], [])],
    ),
    (
        "longest_word(text)",
        "returns the longest word, the first of several; words are separated by spaces; '' where there is none",
        "return max(text.split(), key=len, default='')",
        [(["a bird sings"], "sings"), (["one two"], "one"), ([""], "")],
    ),
    (
        "running_total(numbers)",
        "returns the list of sums of the first 1, 2, 3, ... numbers",
        "total, sums = 0, []\nfor number in numbers:\n    total += number\n    sums.append(total)\nreturn sums",
        [([[1, 2, 3]], [1, 3, 6]), ([[]], []), ([[5, -5, 2]], [5, 0, 2])],
    ),
    (
        "collatz_steps(n)",
        "counts the steps to 1 when an even number is halved and an odd one becomes three times itself plus one",
        "steps = 0\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n    steps += 1\nreturn steps",
        [([1], 0), ([6], 8), ([27], 111)],
    ),
    (
        "leap_year(year)",
        "tells whether a year of the Gregorian calendar is a leap year",
        "return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)",
        [([2024], True), ([1900], False), ([2000], True), ([2023], False)],
    ),
    (
        "title_case(text)",
        "makes the first letter of each word upper case and the others lower case; words are separated by one space",
        "return ' '.join(word[:1].upper() + word[1:].lower() for word in text.split(' '))",
        [(["hello world"], "Hello World"), (["a bIRD"], "A Bird"), ([""], "")],
    ),
    (
        "divisors(n)",
        "returns all positive divisors of a positive whole number, in ascending order",
        "return [d for d in range(1, n + 1) if n % d == 0]",
        [([1], [1]), ([12], [1, 2, 3, 4, 6, 12]), ([13], [1, 13])],
    ),
]
