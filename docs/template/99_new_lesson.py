# %% [markdown]
# # Ask one question
#
# Say in two or three sentences what a learner meets at work, and why it matters. **Then ask the one question that
# this lesson answers, in bold.**
#
# | | |
# |---|---|
# | **What you'll do** | what the hands do: measure, build, break |
# | **What you'll learn** | what stays afterwards |
# | **What you'll need** | the lesson before; a laptop, no GPU, no network |
# | **Time to run** | {{time}} on {{cores}} CPU cores, with at most {{peak_gb}} GB of memory |

# %%
from course_utils import plotting, runtime
from course_utils.exercises import lesson99, progress

runtime.quiet_imports()

# %% [markdown]
# ## One idea a section
#
# A sentence or three, then what the next cell does.
#
# **Predict:** what will it print?

# %%
inputs, outputs, rank = 256, 256, 8
full, thin = inputs * outputs, rank * (inputs + outputs)
plotting.table(["", "numbers"], [["full matrix", f"{full:,}"], ["A and B", f"{thin:,}"]])

# %% [markdown]
# **One takeaway, in bold: two thin matrices have a fraction of the numbers.**
#
# ### Exercise: what fraction? (warm-up, 5 min)
#
# Return the share of the full matrix's numbers that *A* and *B* hold together. Expected for 256, 256 and rank 8:
# 0.0625.
#
# <details><summary>My share is above 1</summary>
# <em>A</em> has rank × inputs numbers, <em>B</em> outputs × rank. They add up.
# </details>


# %% exercise="99.share" points=2
def share(inputs, outputs, rank):
    """Return the numbers in A and B, as a share of those in the full matrix."""
    ### BEGIN SOLUTION
    return rank * (inputs + outputs) / (inputs * outputs)
    ### END SOLUTION


lesson99.share(share)

# %%
### BEGIN HIDDEN TESTS
assert lesson99.share.outcome(share).passed
assert share(10, 40, 2) == 0.25
### END HIDDEN TESTS

# %% [markdown]
# ## Break it
#
# Make the classic mistake on purpose: what does a person see, and which check finds it?

# %%
too_high = 200
share_of_full = too_high * (inputs + outputs) / full
print(f"At rank {too_high}, A and B have {share_of_full:.0%} of the full matrix's numbers.")

# %% [markdown]
# ## Recap
#
# What this notebook measured, in one table:

# %%
plotting.table(["", "measured"], [["share at rank 8", f"{thin / full:.1%}"]])
progress("99")

# %% [markdown]
# ## Take it to work
#
# One cell with the same look at the reader's own model.

# %%
my_inputs, my_outputs, my_rank = 4096, 4096, 16
print(f"{my_rank * (my_inputs + my_outputs) / (my_inputs * my_outputs):.2%}")

# %% [markdown]
# ## Quiz
#
# <details><summary>1 · A question that the lesson has answered?</summary>
# Its answer, in a sentence.
# </details>
#
# ## Where to read on
#
# - The paper, and the library's page, with links
